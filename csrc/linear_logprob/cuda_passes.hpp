// The same passes on a GPU; cuda.cu where the extension is built with CUDA, otherwise a refusal.
#pragma once

#include "linear_logprob/api.hpp"

namespace megarpt::linear_logprob::cuda {

#ifdef MEGARPT_CUDA

void add_tile(const Matrix& logits, const Vector& labels, int64_t first_column, double inverse_temperature,
              const RowState& state, std::uintptr_t stream);
void write_gradient(const Matrix& source, const Vector& rows, int64_t first_column, double inverse_temperature,
                    const RowGradient& gradient, const Matrix& out, std::uintptr_t stream);

#else

template <typename... Anything>
void add_tile(const Anything&...) {
  fail("linear_logprob", "got tensors on a GPU, but the extension was built without CUDA");
}
template <typename... Anything>
void write_gradient(const Anything&...) {
  fail("linear_logprob", "got tensors on a GPU, but the extension was built without CUDA");
}

#endif

}  // namespace megarpt::linear_logprob::cuda
