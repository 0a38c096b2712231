// The same passes, compiled for several instruction sets; cpu.cpp takes the best one this processor has.
#pragma once

#include "linear_logprob/api.hpp"

namespace megarpt::linear_logprob {

struct CpuPasses {
  void (*add_tile)(const Matrix&, const Vector&, int64_t, double, const RowState&);
  void (*write_gradient)(const Matrix&, const Vector&, int64_t, double, const RowGradient&, const Matrix&);
  void (*add_transposed)(const Matrix&, const Matrix&, bool);
};

namespace baseline {
const CpuPasses& passes();
}
namespace avx2 {
const CpuPasses& passes();
}
namespace avx512 {
const CpuPasses& passes();
}

}  // namespace megarpt::linear_logprob
