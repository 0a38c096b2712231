// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma (setup.py).
#define MEGARPT_ISA avx512
#include "cached_attention/cpu_heads.hpp"
