// The GPU's passes over rows of logits: what one thread does. README.md says why it is done this way.
//
// A row is the work of a group of threads, a warp or a whole block. Its entries are read 16 bytes a time, in packs; the entries
// before the first 16-byte boundary and behind the last whole pack are the row's edges, at most one of them for a thread.
// Dims as in api.hpp; p counts the packs of a row.
#pragma once

#include <limits>

#include "common/cuda.hpp"

namespace megarpt::linear_logprob::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kBlock = 128;                                // threads
constexpr int kSpan = 1 << 14;                             // columns of a gradient's row that one block writes
constexpr int kNowhere = std::numeric_limits<int>::max();  // a column behind all others
constexpr unsigned kEveryLane = 0xffffffffu;

// exp of this is 0, and it is finite: 0 times it is 0, as the limit of x exp x is, where 0 times minus infinity is NaN.
template <typename W>
constexpr W kLowest = sizeof(W) == sizeof(float) ? W(-110) : W(-760);

template <typename W>
constexpr W kNothing = -std::numeric_limits<W>::infinity();  // the largest of no numbers

// Entries that a thread works on at a time: enough loads to hide their latency, and all in registers.
template <typename W>
constexpr int kInFlight = sizeof(W) == sizeof(float) ? 16 : 4;

// Blocks that a multiprocessor holds at a time, at least.
template <typename W>
constexpr int kResident = sizeof(W) == sizeof(float) ? 8 : 4;

template <typename T, int kSize>
struct alignas(16) Pack {
  T values[kSize];
};

template <typename W>
struct StateOfRows {  // RowState
  W* largest;
  double *sum, *weighted;
  W* target;
  int64_t* best;
};

template <typename W>
struct GradientOfRows {  // RowGradient
  const W *largest, *log_sum, *constant, *slope;
  const int64_t* label;
  const W* at_label;
  const int64_t* best;
  const W* at_best;
};

// The softmax of the columns that one thread has seen.
template <typename W>
struct Part {
  W largest = kNothing<W>, sum = 0, weighted = 0;
};

template <typename T>
__device__ bool starts_pack(const T* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// Columns before the first 16-byte boundary of a row.
template <typename T>
__device__ int before_packs(const T* row, int cols) {
  const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(T));
  const int head = past == 0 ? 0 : static_cast<int>(16 / sizeof(T)) - past;
  return head < cols ? head : cols;
}

template <typename W>
__device__ W bounded(W x) {
  return x < kLowest<W> ? kLowest<W> : x;  // NaN stays NaN
}

// What exponents are counted from: minus infinity would turn the zeros that its equals contribute into NaN.
template <typename W>
__device__ W origin(W largest) {
  return largest == kNothing<W> ? W(0) : largest;
}

// For sums over a row. A softmax weighs the error of the quick one, which grows with |x|, by exp(x): the sum is off by 2 + 1.2
// H units in the last place at most, H <= log v the entropy. Logits of half precision are off by thousands of that, and there
// is no time for more while 2 bytes arrive.
template <typename T, typename W>
__device__ W exponential_in_sum(W x) {
  if constexpr (sizeof(T) == 2) {
    return quick_exponential(x);
  } else {
    return exponential(x);
  }
}

template <typename V, typename Merge>
__device__ V over_warp(V value, Merge merge) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = merge(value, __shfl_xor_sync(kEveryLane, value, distance));
  }
  return value;
}

// Every thread of the group gets the result, merged in the same order every time. `shared`: one for each warp of the group.
template <int kGroup, typename V, typename Merge>
__device__ V over_group(V value, V* shared, Merge merge) {
  value = over_warp(value, merge);
  if constexpr (kGroup > kWarp) {
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = shared[0];
#pragma unroll
    for (int warp = 1; warp < kGroup / kWarp; ++warp) value = merge(value, shared[warp]);
  }
  return value;
}

// Adds logits to a thread's part. True when one of them is the largest so far.
template <typename T, bool kWeighted, int kCount, typename W>
__device__ bool add(const W (&z)[kCount], Part<W>& part) {
  W here = z[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) here = larger(here, z[k]);
  const bool rises = here > part.largest;
  if (rises) {
    const W shift = bounded(part.largest - here), factor = exponential(shift);
    part.weighted = factor * (part.weighted + shift * part.sum);
    part.sum *= factor;
    part.largest = here;
  }
  const W from = origin(part.largest);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const W below = z[k] - from;
    if constexpr (kWeighted) {
      const W finite = bounded(below), e = exponential_in_sum<T>(finite);
      part.sum += e;
      part.weighted += e * finite;
    } else {
      part.sum += exponential_in_sum<T>(below);
    }
  }
  return rises;
}

// Loads `kCount` packs that are a group apart, then adds them: the loads are under way together.
template <bool kWeighted, int kGroup, int kCount, typename T, int kSize, typename W>
__device__ bool add_packs(const Pack<T, kSize>* packs, W scale, Part<W>& part) {
  Pack<T, kSize> loaded[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) loaded[j] = packs[j * kGroup];
  W z[kCount * kSize];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) z[j * kSize + k] = product(widen(loaded[j].values[k]), scale);
  }
  return add<T, kWeighted>(z, part);
}

// Of the packs p, p + kGroup, ..., the first column whose logit is `value`; counted from the first pack.
template <int kGroup, typename T, int kSize, typename W>
__device__ int find(const Pack<T, kSize>* packs, int p, int num_packs, W scale, W value) {
  for (; p < num_packs; p += kGroup) {
    const Pack<T, kSize> loaded = packs[p];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (product(widen(loaded.values[k]), scale) == value) return p * kSize + k;
    }
  }
  return kNowhere;
}

// Sums relative to `from`, counted from `to` >= from.
inline __device__ void recount(double from, double to, double& sum, double& weighted) {
  if (from == to || sum == 0.0) return;
  const double shift = from - to, factor = exponential(shift);
  weighted = factor * (weighted + shift * sum);
  sum *= factor;
}

template <typename T, bool kWeighted, int kGroup>
__global__ void __launch_bounds__(kBlock, kResident<typename Wide<T>::type>)
    add_tile_kernel(const T* __restrict__ logits, int64_t n, int cols, int64_t stride, const int64_t* __restrict__ labels,
                    int64_t first_column, typename Wide<T>::type scale, StateOfRows<typename Wide<T>::type> state) {
  using W = typename Wide<T>::type;
  constexpr int kSize = 16 / sizeof(T), kCount = kInFlight<W> / kSize;
  __shared__ W shared_largest[kBlock / kWarp], shared_sum[kBlock / kWarp], shared_weighted[kBlock / kWarp];
  __shared__ int shared_best[kBlock / kWarp];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kBlock / kGroup) + threadIdx.x / kGroup;
  if (i >= n) return;  // a whole warp: where a group is a block, every block has a row
  const int t = threadIdx.x % kGroup;

  const T* row = logits + i * stride;
  const int head = before_packs(row, cols), num_packs = (cols - head) / kSize, behind = head + num_packs * kSize;
  const auto* packs = reinterpret_cast<const Pack<T, kSize>*>(row + head);
  const W before = state.largest[i];
  Part<W> part;
  int p = t, rose_at = 0;  // the packs loaded together among which is the thread's first largest logit
  for (; p + (kCount - 1) * kGroup < num_packs; p += kCount * kGroup) {
    if (add_packs<kWeighted, kGroup, kCount>(packs + p, scale, part)) rose_at = p;
  }
  for (; p < num_packs; p += kGroup) {
    if (add_packs<kWeighted, kGroup, 1>(packs + p, scale, part)) rose_at = p;
  }
  const W largest_in_packs = part.largest;
  const int edge = t < head ? t : behind + (t - head);
  W at_edge[1] = {kNothing<W>};
  if (edge < cols) {
    at_edge[0] = product(widen(row[edge]), scale);
    add<T, kWeighted>(at_edge, part);
  }

  const auto plus = [](W a, W b) { return a + b; };
  const W largest = over_group<kGroup>(part.largest, shared_largest, [](W a, W b) { return larger(a, b); });
  const W shift = bounded(part.largest - origin(largest)), factor = exponential(shift);
  const W sum = over_group<kGroup>(factor * part.sum, shared_sum, plus);
  W weighted = 0;
  if constexpr (kWeighted) {
    weighted = over_group<kGroup>(factor * (part.weighted + shift * part.sum), shared_weighted, plus);
  }
  const bool rises = largest > before;
  int best = kNowhere;
  if (rises) {  // the few threads that saw the row's largest logit look for its column
    if (largest_in_packs == largest) best = head + find<kGroup>(packs, rose_at, num_packs, scale, largest);
    if (at_edge[0] == largest && edge < best) best = edge;
    best = over_group<kGroup>(best, shared_best, [](int a, int b) { return a < b ? a : b; });
  }

  if (t != 0) return;
  const W after = rises ? largest : before;
  double old_sum = state.sum[i], old_weighted = kWeighted ? state.weighted[i] : 0.0, new_sum = sum, new_weighted = weighted;
  recount(before, after, old_sum, old_weighted);
  recount(largest, after, new_sum, new_weighted);
  state.sum[i] = old_sum + new_sum;
  if constexpr (kWeighted) state.weighted[i] = old_weighted + new_weighted;
  if (rises) {
    state.largest[i] = largest;
    state.best[i] = first_column + best;
  }
  const int64_t label = labels[i] - first_column;
  if (label >= 0 && label < cols) state.target[i] = product(widen(row[label]), scale);
}

template <typename W>
struct GradientOfRow {
  W scale, largest, log_sum, constant, slope;
};

template <bool kSlope, typename O, typename T, typename W>
__device__ O gradient_at(T logit, const GradientOfRow<W>& row) {
  const W log_p = (product(widen(logit), row.scale) - row.largest) - row.log_sum;
  if constexpr (kSlope) {
    const W finite = bounded(log_p);
    return narrow<O>(exponential(finite) * (row.constant + row.slope * finite));
  } else {
    return narrow<O>(exponential(log_p) * row.constant);
  }
}

// Each pack is loaded and stored by one thread, so `out` may be `source`.
template <bool kSlope, int kGroup, int kCount, typename T, typename O, int kSize, typename W>
__device__ void write_packs(const Pack<T, kSize>* source, Pack<O, kSize>* out, const GradientOfRow<W>& row) {
  Pack<T, kSize> loaded[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) loaded[j] = source[j * kGroup];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    Pack<O, kSize> result;
#pragma unroll
    for (int k = 0; k < kSize; ++k) result.values[k] = gradient_at<kSlope, O>(loaded[j].values[k], row);
    out[j * kGroup] = result;
  }
}

// blockIdx.y counts spans of `kSpan` columns.
template <typename T, typename O, bool kSlope, int kGroup>
__global__ void __launch_bounds__(kBlock, kResident<typename Wide<T>::type>)
    write_gradient_kernel(const T* source, int64_t source_stride, const int64_t* __restrict__ rows, O* out, int64_t out_stride,
                          int64_t n, int cols, int64_t first_column, typename Wide<T>::type scale,
                          GradientOfRows<typename Wide<T>::type> gradient) {
  using W = typename Wide<T>::type;
  constexpr int kSize = 16 / (sizeof(T) < sizeof(O) ? sizeof(T) : sizeof(O)), kCount = kInFlight<W> / kSize;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kBlock / kGroup) + threadIdx.x / kGroup;
  if (i >= n) return;  // see add_tile_kernel
  const int t = threadIdx.x % kGroup;

  const int start = static_cast<int>(blockIdx.y) * kSpan, size = cols - start < kSpan ? cols - start : kSpan;
  const T* from = source + (rows == nullptr ? i : rows[i]) * source_stride + start;
  O* to = out + i * out_stride + start;
  const GradientOfRow<W> row = {scale, gradient.largest[i], gradient.log_sum[i], gradient.constant[i],
                                kSlope ? gradient.slope[i] : W(0)};
  int head = before_packs(to, size);
  if (!starts_pack(from + head)) head = size;  // no column starts a pack on both sides: entry by entry
  const int num_packs = (size - head) / kSize, behind = head + num_packs * kSize;
  const auto* source_packs = reinterpret_cast<const Pack<T, kSize>*>(from + head);
  auto* out_packs = reinterpret_cast<Pack<O, kSize>*>(to + head);
  int p = t;
  for (; p + (kCount - 1) * kGroup < num_packs; p += kCount * kGroup) {
    write_packs<kSlope, kGroup, kCount>(source_packs + p, out_packs + p, row);
  }
  for (; p < num_packs; p += kGroup) write_packs<kSlope, kGroup, 1>(source_packs + p, out_packs + p, row);
  for (int j = t; j < head; j += kGroup) to[j] = gradient_at<kSlope, O>(from[j], row);
  for (int j = behind + t; j < size; j += kGroup) to[j] = gradient_at<kSlope, O>(from[j], row);

  if constexpr (kGroup > kWarp) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (t != 0) return;
  const int64_t best = gradient.best[i] - first_column - start, label = gradient.label[i] - first_column - start;
  if (best >= 0 && best < size) to[best] = narrow<O>(gradient.at_best[i]);
  if (label >= 0 && label < size) to[label] = narrow<O>(gradient.at_label[i]);
}

}  // namespace
}  // namespace megarpt::linear_logprob::cuda
