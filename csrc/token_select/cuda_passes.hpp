// The same passes on a GPU; cuda.cu where the extension is built with CUDA, otherwise a refusal.
#pragma once

#include "token_select/api.hpp"

namespace megarpt::token_select::cuda {

#ifdef MEGARPT_CUDA

void score_excess(const Vector& logprob, const Vector& reference, const Scores& scores, const Vector& histogram,
                  std::uintptr_t stream);
void count_digits(const Scores& scores, const Vector& search, int shift, int width, const Vector& histogram,
                  std::uintptr_t stream);
void count_order_digits(const Scores& scores, const Search& search, int shift, int width, const Vector& histogram,
                        std::uintptr_t stream);
void choose_digit(const Vector& histogram, const Vector& search, int width, const Vector& result, std::uintptr_t stream);
void count_equals(const Scores& scores, const Search& search, const Vector& counts, std::uintptr_t stream);
void write_mask(const Scores& scores, const Search& search, const Vector& starts, const Vector& mask, const Report& report,
                std::uintptr_t stream);
void add_up(const Scores& scores, const Vector& mask, const Report& report, std::uintptr_t stream);

#else

inline void refuse() { fail("token_select", "got tensors on a GPU, but the extension was built without CUDA"); }
template <typename... Anything>
void score_excess(const Anything&...) {
  refuse();
}
template <typename... Anything>
void count_digits(const Anything&...) {
  refuse();
}
template <typename... Anything>
void count_order_digits(const Anything&...) {
  refuse();
}
template <typename... Anything>
void choose_digit(const Anything&...) {
  refuse();
}
template <typename... Anything>
void count_equals(const Anything&...) {
  refuse();
}
template <typename... Anything>
void write_mask(const Anything&...) {
  refuse();
}
template <typename... Anything>
void add_up(const Anything&...) {
  refuse();
}

#endif

}  // namespace megarpt::token_select::cuda
