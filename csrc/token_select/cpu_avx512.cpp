// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma (setup.py).
#define MEGARPT_ISA avx512
#include "token_select/cpu_chunks.hpp"
