// What every processor of the target has.
#define MEGARPT_ISA baseline
#include "linear_logprob/cpu_rows.hpp"
