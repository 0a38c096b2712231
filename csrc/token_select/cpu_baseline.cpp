// What every processor of the target has.
#define MEGARPT_ISA baseline
#include "token_select/cpu_chunks.hpp"
