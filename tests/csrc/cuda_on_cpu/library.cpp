// csrc/linear_logprob with C linkage, for ctypes. Each function returns what went wrong, or null.
#include <exception>
#include <string>

#include "linear_logprob/api.hpp"

namespace {

using megarpt::Matrix;
using megarpt::Place;
using megarpt::Vector;
using namespace megarpt::linear_logprob;

template <typename Body>
const char* caught(const Body& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" const char* call_add_tile(bool on_cuda, const Matrix* logits, const Vector* labels, int64_t first_column,
                                     double inverse_temperature, const RowState* state) {
  return caught([&] { add_tile(*logits, *labels, first_column, inverse_temperature, *state, Place{on_cuda, 0}); });
}

extern "C" const char* call_write_gradient(bool on_cuda, const Matrix* source, const Vector* rows, int64_t first_column,
                                           double inverse_temperature, const RowGradient* gradient, const Matrix* out) {
  return caught([&] { write_gradient(*source, *rows, first_column, inverse_temperature, *gradient, *out, Place{on_cuda, 0}); });
}
