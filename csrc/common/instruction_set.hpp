// Which of the instruction sets that csrc/*/cpu_*.cpp are compiled for this processor has.
#pragma once

namespace megarpt {

#ifdef MEGARPT_X86
inline bool has_avx512() {
  static const bool kHas = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return kHas;
}
inline bool has_avx2() {
  static const bool kHas = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return kHas;
}
inline const char* instruction_set() { return has_avx512() ? "AVX-512" : has_avx2() ? "AVX2" : "baseline"; }

// `function` of the namespace of the best instruction set.
#define MEGARPT_BEST(function) (has_avx512() ? avx512::function : has_avx2() ? avx2::function : baseline::function)
#else
inline const char* instruction_set() { return "baseline"; }
#define MEGARPT_BEST(function) (baseline::function)
#endif

}  // namespace megarpt
