// Compiled with -mavx2 -mfma (setup.py).
#define MEGARPT_ISA avx2
#include "linear_logprob/cpu_rows.hpp"
