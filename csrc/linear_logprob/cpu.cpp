// What callers may get wrong, and which instruction set does the work.
#include "common/instruction_set.hpp"
#include "linear_logprob/api.hpp"
#include "linear_logprob/cpu_passes.hpp"
#include "linear_logprob/cuda_passes.hpp"

namespace megarpt::linear_logprob {
namespace {

const CpuPasses& passes() { return MEGARPT_BEST(passes)(); }

DType wide(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace

void add_tile(const Matrix& logits, const Vector& labels, int64_t first_column, double inverse_temperature,
              const RowState& state, const Place& place) {
  constexpr const char* kOp = "linear_logprob.add_tile";
  check_floating(kOp, "logits", logits.dtype);
  const int64_t n = logits.rows;
  const DType w = wide(logits.dtype);
  check_vector(kOp, "labels", labels, n, DType::kInt64);
  check_vector(kOp, "largest", state.largest, n, w);
  check_vector(kOp, "sum", state.sum, n, DType::kFloat64);
  check_optional(kOp, "weighted", state.weighted, n, DType::kFloat64);
  check_vector(kOp, "target", state.target, n, w);
  check_vector(kOp, "best", state.best, n, DType::kInt64);
  if (n == 0 || logits.cols == 0) return;
  if (place.is_cuda) return cuda::add_tile(logits, labels, first_column, inverse_temperature, state, place.stream);
  passes().add_tile(logits, labels, first_column, inverse_temperature, state);
}

void write_gradient(const Matrix& source, const Vector& rows, int64_t first_column, double inverse_temperature,
                    const RowGradient& gradient, const Matrix& out, const Place& place) {
  constexpr const char* kOp = "linear_logprob.write_gradient";
  check_floating(kOp, "source", source.dtype);
  const int64_t n = out.rows;
  const DType w = wide(source.dtype);
  const bool narrows = source.dtype == DType::kFloat32 && (out.dtype == DType::kBFloat16 || out.dtype == DType::kFloat16);
  if ((out.dtype != source.dtype && !narrows) || out.cols != source.cols) {
    fail(kOp, "out: got ", name_of(out.dtype), " with ", out.cols, " columns, expected ", name_of(source.dtype), " with ",
         source.cols, " as source has (bfloat16 or float16 may follow float32)");
  }
  if (!rows && source.rows != n) fail(kOp, "out: got ", n, " rows, expected ", source.rows, " as source has");
  if ((rows || narrows) && out.data == source.data) {
    fail(kOp, "out: got source's own memory, expected other memory when ", rows ? "rows are chosen" : "the type changes");
  }
  check_optional(kOp, "rows", rows, n, DType::kInt64);
  check_vector(kOp, "largest", gradient.largest, n, w);
  check_vector(kOp, "log_sum", gradient.log_sum, n, w);
  check_vector(kOp, "constant", gradient.constant, n, w);
  check_optional(kOp, "slope", gradient.slope, n, w);
  check_vector(kOp, "label", gradient.label, n, DType::kInt64);
  check_vector(kOp, "at_label", gradient.at_label, n, w);
  check_vector(kOp, "best", gradient.best, n, DType::kInt64);
  check_vector(kOp, "at_best", gradient.at_best, n, w);
  if (n == 0 || out.cols == 0) return;
  if (place.is_cuda) {
    return cuda::write_gradient(source, rows, first_column, inverse_temperature, gradient, out, place.stream);
  }
  passes().write_gradient(source, rows, first_column, inverse_temperature, gradient, out);
}

void add_transposed(const Matrix& source, const Matrix& out, bool overwrite) {
  constexpr const char* kOp = "linear_logprob.add_transposed";
  if (source.dtype != DType::kFloat32 || !is_floating(out.dtype) || out.dtype == DType::kFloat64) {
    fail(kOp, "got source ", name_of(source.dtype), ", out ", name_of(out.dtype),
         "; expected float32, and float32, bfloat16 or float16");
  }
  if (source.rows != out.cols || source.cols != out.rows) {
    fail(kOp, "out: got [", out.rows, ", ", out.cols, "], expected [", source.cols, ", ", source.rows, "]");
  }
  passes().add_transposed(source, out, overwrite);
}

}  // namespace megarpt::linear_logprob
