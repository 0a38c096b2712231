// Compiled with -mavx2 -mfma (setup.py).
#define MEGARPT_ISA avx2
#include "token_select/cpu_chunks.hpp"
