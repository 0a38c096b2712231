// Compiled with -mavx2 -mfma (setup.py).
#define MEGARPT_ISA avx2
#include "cached_attention/cpu_heads.hpp"
