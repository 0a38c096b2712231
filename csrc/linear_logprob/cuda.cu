// Which kernel, and how many threads of it.
#include <type_traits>

#include "linear_logprob/cuda_passes.hpp"
#include "linear_logprob/cuda_rows.cuh"

namespace megarpt::linear_logprob::cuda {
namespace {

constexpr int64_t kNarrow = 2048;                         // up to so many columns a row is the work of one warp
constexpr int64_t kMostBlocks = 2147483647;               // along x
constexpr int64_t kMostColumns = 65535 * int64_t{kSpan};  // blocks along y; and a column is an int

// Calls `body` with a null pointer to the element type.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<Float16*>(nullptr));
    case DType::kFloat64:
      return body(static_cast<double*>(nullptr));
    default:
      return;  // refused by cpu.cpp
  }
}

// A gradient has its logits' type, or half precision where they have single.
template <typename T, typename O>
constexpr bool kCanNarrow = std::is_same_v<T, O> || (std::is_same_v<T, float> && sizeof(O) < sizeof(float));

dim3 grid(const char* op, int64_t rows, int64_t cols, int group, int64_t span) {
  const int64_t rows_of_block = kBlock / group, blocks = (rows + rows_of_block - 1) / rows_of_block;
  if (blocks > kMostBlocks || cols > kMostColumns) {
    fail(op, "got [", rows, ", ", cols, "], expected at most [", kMostBlocks, ", ", kMostColumns, "]: give smaller tiles");
  }
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((cols + span - 1) / span));
}

template <typename T, bool kWeighted, int kGroup>
void queue_add_tile(const Matrix& logits, const Vector& labels, int64_t first_column, double inverse_temperature,
                    const RowState& state, std::uintptr_t stream) {
  constexpr const char* kOp = "linear_logprob.add_tile";
  using W = typename Wide<T>::type;
  const StateOfRows<W> rows = {state.largest.as<W>(), state.sum.as<double>(), state.weighted.as<double>(), state.target.as<W>(),
                               state.best.as<int64_t>()};
  launch(kOp, &add_tile_kernel<T, kWeighted, kGroup>, grid(kOp, logits.rows, logits.cols, kGroup, kMostColumns), kBlock, stream,
         logits.row<const T>(0), logits.rows, static_cast<int>(logits.cols), logits.stride, labels.as<const int64_t>(),
         first_column, static_cast<W>(inverse_temperature), rows);
}

template <typename T, typename O, bool kSlope, int kGroup>
void queue_write_gradient(const Matrix& source, const Vector& rows, int64_t first_column, double inverse_temperature,
                          const RowGradient& gradient, const Matrix& out, std::uintptr_t stream) {
  constexpr const char* kOp = "linear_logprob.write_gradient";
  using W = typename Wide<T>::type;
  const GradientOfRows<W> of_rows = {gradient.largest.as<W>(),    gradient.log_sum.as<W>(),     gradient.constant.as<W>(),
                                     gradient.slope.as<W>(),      gradient.label.as<int64_t>(), gradient.at_label.as<W>(),
                                     gradient.best.as<int64_t>(), gradient.at_best.as<W>()};
  launch(kOp, &write_gradient_kernel<T, O, kSlope, kGroup>, grid(kOp, out.rows, out.cols, kGroup, kSpan), kBlock, stream,
         source.row<const T>(0), source.stride, rows.as<const int64_t>(), out.row<O>(0), out.stride, out.rows,
         static_cast<int>(out.cols), first_column, static_cast<W>(inverse_temperature), of_rows);
}

// Calls `body` with constants: whether the optional part is wanted, and how many threads a row gets.
template <typename Body>
void with_version(bool optional_part, int64_t cols, const Body& body) {
  const auto with_group = [&](auto wanted) {
    if (cols <= kNarrow) return body(wanted, std::integral_constant<int, kWarp>());
    return body(wanted, std::integral_constant<int, kBlock>());
  };
  if (optional_part) return with_group(std::true_type());
  return with_group(std::false_type());
}

}  // namespace

void add_tile(const Matrix& logits, const Vector& labels, int64_t first_column, double inverse_temperature,
              const RowState& state, std::uintptr_t stream) {
  with_type(logits.dtype, [&](auto* entry) {
    using T = std::remove_pointer_t<decltype(entry)>;
    with_version(static_cast<bool>(state.weighted), logits.cols, [&](auto weighted, auto group) {
      queue_add_tile<T, decltype(weighted)::value, decltype(group)::value>(logits, labels, first_column, inverse_temperature,
                                                                           state, stream);
    });
  });
}

void write_gradient(const Matrix& source, const Vector& rows, int64_t first_column, double inverse_temperature,
                    const RowGradient& gradient, const Matrix& out, std::uintptr_t stream) {
  with_type(source.dtype, [&](auto* source_entry) {
    with_type(out.dtype, [&](auto* out_entry) {
      using T = std::remove_pointer_t<decltype(source_entry)>;
      using O = std::remove_pointer_t<decltype(out_entry)>;
      if constexpr (kCanNarrow<T, O>) {  // the others are refused by cpu.cpp
        with_version(static_cast<bool>(gradient.slope), out.cols, [&](auto slope, auto group) {
          queue_write_gradient<T, O, decltype(slope)::value, decltype(group)::value>(
              source, rows, first_column, inverse_temperature, gradient, out, stream);
        });
      }
    });
  });
}

}  // namespace megarpt::linear_logprob::cuda
