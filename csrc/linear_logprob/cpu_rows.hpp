// The CPU's passes over rows of logits. Included by one file per instruction set, which says what `MEGARPT_ISA` is.
#pragma once

#include <limits>
#include <type_traits>

#include "common/numbers.hpp"
#include "linear_logprob/cpu_passes.hpp"

namespace megarpt::linear_logprob::MEGARPT_ISA {
namespace {

constexpr int64_t kBlock = 1024;      // columns worked on at a time: their wide copy stays in the first-level cache
constexpr int64_t kParallel = 32768;  // fewer entries than this are not worth waking other threads

// A gradient has its logits' type, or half precision where they have single.
template <typename T, typename O>
constexpr bool kCanNarrow = std::is_same_v<T, O> || (std::is_same_v<T, float> && sizeof(O) < sizeof(float));

// e times something at x, where e = exp(x): 0 times minus infinity, the limit of which is 0, would be NaN. exponential compares
// x with the same number, so one comparison serves both.
template <typename W>
inline W product_at(W x, W e, W other) {
  return x < kUnderflow<W> ? W(0) : e * other;
}

template <typename T, typename W>
inline W load_block(const T* source, int64_t count, W scale, W* block) {
  W largest = -std::numeric_limits<W>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < count; ++j) {
    const W z = widen(source[j]) * scale;
    block[j] = z;
    largest = z > largest ? z : largest;
  }
  return largest;
}

template <typename T>
void add_row(const T* logits, int64_t cols, int64_t label, int64_t first_column, typename Wide<T>::type scale, int64_t i,
             const RowState& state) {
  using W = typename Wide<T>::type;
  W largest = state.largest.as<W>()[i];
  double sum = state.sum.as<double>()[i], weighted = state.weighted ? state.weighted.as<double>()[i] : 0.0;
  W block[kBlock];
  for (int64_t start = 0; start < cols; start += kBlock) {
    const int64_t count = cols - start < kBlock ? cols - start : kBlock, first = first_column + start;
    const W here = load_block(logits + start, count, scale, block);
    if (here > largest) {
      if (sum != 0.0) {  // before the first block `largest` is -inf and there is nothing to rescale
        const double shift = static_cast<double>(largest) - static_cast<double>(here), factor = std::exp(shift);
        weighted = factor * (weighted + shift * sum);
        sum *= factor;
      }
      largest = here;
      int64_t j = 0;
      while (block[j] != here) ++j;
      state.best.as<int64_t>()[i] = first + j;
    }
    if (label >= first && label < first + count) state.target.as<W>()[i] = block[label - first];
    // -inf counted from itself would be NaN
    const W origin = largest == -std::numeric_limits<W>::infinity() ? W(0) : largest;
    W partial = 0, partial_weighted = 0;
    if (state.weighted) {
#pragma omp simd reduction(+ : partial, partial_weighted)
      for (int64_t j = 0; j < count; ++j) {
        const W below = block[j] - origin, e = exponential(below);
        partial += e;
        partial_weighted += product_at(below, e, below);
      }
      weighted += partial_weighted;
    } else {
#pragma omp simd reduction(+ : partial)
      for (int64_t j = 0; j < count; ++j) partial += exponential(block[j] - origin);
    }
    sum += partial;
  }
  state.largest.as<W>()[i] = largest;
  state.sum.as<double>()[i] = sum;
  if (state.weighted) state.weighted.as<double>()[i] = weighted;
}

template <typename T, typename O>
void gradient_row(const T* logits, O* out, int64_t cols, int64_t first_column, typename Wide<T>::type scale, int64_t i,
                  const RowGradient& gradient) {
  using W = typename Wide<T>::type;
  const W largest = gradient.largest.as<W>()[i], log_sum = gradient.log_sum.as<W>()[i];
  const W constant = gradient.constant.as<W>()[i], slope = gradient.slope ? gradient.slope.as<W>()[i] : W(0);
  if (gradient.slope) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const W log_p = (widen(logits[j]) * scale - largest) - log_sum;
      out[j] = narrow<O>(product_at(log_p, exponential(log_p), constant + slope * log_p));
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      out[j] = narrow<O>(exponential((widen(logits[j]) * scale - largest) - log_sum) * constant);
    }
  }
  const int64_t best = gradient.best.as<int64_t>()[i] - first_column;
  if (best >= 0 && best < cols) out[best] = narrow<O>(gradient.at_best.as<W>()[i]);
  const int64_t label = gradient.label.as<int64_t>()[i] - first_column;
  if (label >= 0 && label < cols) out[label] = narrow<O>(gradient.at_label.as<W>()[i]);
}

template <typename T>
void add_tile(const Matrix& logits, const Vector& labels, int64_t first_column, double inverse_temperature,
              const RowState& state) {
  const auto scale = static_cast<typename Wide<T>::type>(inverse_temperature);
  const int64_t* label = labels.as<int64_t>();
#pragma omp parallel for schedule(static) if (logits.rows * logits.cols >= kParallel)
  for (int64_t i = 0; i < logits.rows; ++i) {
    add_row(logits.row<const T>(i), logits.cols, label[i], first_column, scale, i, state);
  }
}

template <typename T, typename O>
void write_gradient(const Matrix& source, const Vector& rows, int64_t first_column, double inverse_temperature,
                    const RowGradient& gradient, const Matrix& out) {
  const auto scale = static_cast<typename Wide<T>::type>(inverse_temperature);
#pragma omp parallel for schedule(static) if (out.rows * out.cols >= kParallel)
  for (int64_t i = 0; i < out.rows; ++i) {
    const int64_t from = rows ? rows.as<int64_t>()[i] : i;
    gradient_row(source.row<const T>(from), out.row<O>(i), out.cols, first_column, scale, i, gradient);
  }
}

template <typename T>
void add_transposed(const Matrix& source, const Matrix& out, bool overwrite) {
  constexpr int64_t kTile = 16;
#pragma omp parallel for schedule(static) if (out.rows * out.cols >= kParallel)
  for (int64_t top = 0; top < out.rows; top += kTile) {
    const int64_t bottom = top + kTile < out.rows ? top + kTile : out.rows;
    for (int64_t left = 0; left < out.cols; left += kTile) {
      const int64_t right = left + kTile < out.cols ? left + kTile : out.cols;
      for (int64_t i = top; i < bottom; ++i) {
        T* to = out.row<T>(i);
        for (int64_t j = left; j < right; ++j) {
          const float value = source.row<const float>(j)[i];
          to[j] = narrow<T>(overwrite ? value : widen(to[j]) + value);
        }
      }
    }
  }
}

}  // namespace

const CpuPasses& passes() {
  static const CpuPasses kPasses{
      [](const Matrix& logits, const Vector& labels, int64_t first_column, double inverse_temperature, const RowState& state) {
        with_type(logits.dtype,
                  [&](auto of) { add_tile<decltype(of)>(logits, labels, first_column, inverse_temperature, state); });
      },
      [](const Matrix& source, const Vector& rows, int64_t first_column, double inverse_temperature,
         const RowGradient& gradient, const Matrix& out) {
        with_type(source.dtype, [&](auto from) {
          with_type(out.dtype, [&](auto to) {
            using T = decltype(from);
            using O = decltype(to);
            if constexpr (kCanNarrow<T, O>) {
              write_gradient<T, O>(source, rows, first_column, inverse_temperature, gradient, out);
            }
          });
        });
      },
      [](const Matrix& source, const Matrix& out, bool overwrite) {
        with_type(out.dtype, [&](auto of) {
          if constexpr (sizeof(of) <= sizeof(float)) add_transposed<decltype(of)>(source, out, overwrite);
        });
      },
  };
  return kPasses;
}

}  // namespace megarpt::linear_logprob::MEGARPT_ISA
