// What every processor of the target has.
#define MEGARPT_ISA baseline
#include "cached_attention/cpu_heads.hpp"
