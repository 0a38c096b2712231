// The same passes, compiled for several instruction sets; cpu.cpp takes the best one this processor has.
#pragma once

#include "token_select/api.hpp"

namespace megarpt::token_select {

struct CpuPasses {
  void (*score_excess)(const Vector&, const Vector&, const Scores&, const Vector&);
  void (*count_digits)(const Scores&, const Vector&, int, int, const Vector&);
  void (*count_order_digits)(const Scores&, const Search&, int, int, const Vector&);
  void (*count_equals)(const Scores&, const Search&, const Vector&);
  void (*write_mask)(const Scores&, const Search&, const Vector&, const Vector&, const Report&);
  void (*add_up)(const Scores&, const Vector&, const Report&);
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

}  // namespace megarpt::token_select
