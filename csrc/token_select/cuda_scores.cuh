// The GPU's passes over scores: what one thread does. README.md says why it is done this way.
//
// Counts are added up by atomics, which order does not change; sums are not: chunk by chunk, each in a tree, then over chunks
// in a tree, the same every time.
#pragma once

#include "common/cuda.hpp"
#include "token_select/api.hpp"
#include "token_select/keys.hpp"

namespace megarpt::token_select::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;                   // scores of a thread whose loads are under way together
constexpr int kOwnBins = kNumBins / kThreads;  // of a thread, where a histogram is the work of one block
constexpr int kOwnScores = kChunk / kThreads;  // of a thread, next to each other, where their order matters
constexpr uint32_t kOutside = kNumBins;        // the digit of what does not compete
using Count = unsigned long long;              // what atomicAdd knows of 64 bits

// Where the digits of a histogram come from. `start` reads what the pass before left in the device's memory.
struct DigitsOfExcess {
  const float* __restrict__ logprob, * __restrict__ reference;
  const uint8_t* __restrict__ valid;
  float* __restrict__ score;  // overlaps none of the others, so that loads need not wait for it

  __device__ void start() {}
  __device__ uint32_t at(int64_t i) const {
    const float excess = -logprob[i] - reference[i];
    score[i] = excess;
    const uint32_t digit = score_key(excess) >> kFirstShift;
    return valid[i] ? digit : kOutside;
  }
};

struct DigitsOfScores {
  const float* score;
  const uint8_t* valid;
  const uint64_t* search;
  Digit digit;

  __device__ void start() { digit.prefix = search[0]; }
  __device__ uint32_t at(int64_t i) const {
    const uint32_t of_key = digit.of(score_key(score[i]), kOutside);
    return valid[i] ? of_key : kOutside;
  }
};

struct DigitsOfOrders {
  const float* score;
  const uint8_t* valid;
  const int64_t* order;
  const uint64_t *search, *order_search;
  Digit digit;
  uint32_t kth;

  __device__ void start() {
    digit.prefix = order_search[0];
    kth = static_cast<uint32_t>(search[0]);
  }
  __device__ uint32_t at(int64_t i) const {
    return valid[i] && score_key(score[i]) == kth ? digit.of(order_key(order[i]), kOutside) : kOutside;
  }
};

// Where the best k end: the searches' ends. `order` null: equals are not told apart by it.
struct Cut {
  const float* score;
  const uint8_t* valid;
  const int64_t* order;
  const uint64_t *search, *order_search;
  uint32_t kth;
  uint64_t kth_order;

  __device__ void start() {
    kth = static_cast<uint32_t>(search[0]);
    kth_order = order != nullptr ? order_search[0] : 0;
  }
  __device__ int64_t num_equal_kept() const { return static_cast<int64_t>((order != nullptr ? order_search : search)[1]); }
  __device__ bool above(int64_t i) const {
    const uint32_t key = score_key(score[i]);
    return valid[i] && (key > kth || (key == kth && order != nullptr && order_key(order[i]) > kth_order));
  }
  __device__ bool equal(int64_t i) const {
    return valid[i] && score_key(score[i]) == kth && (order == nullptr || order_key(order[i]) == kth_order);
  }
  __device__ bool at_or_above(int64_t i) const { return valid[i] && score_key(score[i]) >= kth; }
};

struct ReportOf {  // Report, with the scores it is about
  const float *score, *loss, *reference, *previous;
  const uint8_t* valid;
  double* partial;
  float sign;
};

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One histogram for each block, in shared memory. Equal digits that a thread sees one after another are counted in a register:
// where all scores are equal, every thread would otherwise wait for every other at one address.
template <typename Digits>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(Digits digits, int64_t n, int64_t num_blocks, Count* __restrict__ histogram) {
  __shared__ unsigned bins[kNumBins];
  for (int bin = threadIdx.x; bin < kNumBins; bin += kThreads) bins[bin] = 0;
  digits.start();
  __syncthreads();
  uint32_t last = kOutside;
  unsigned run = 0;
  for (int64_t first = int64_t{blockIdx.x} * kThreads * kInFlight; first < n; first += num_blocks * kThreads * kInFlight) {
    uint32_t here[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = first + k * kThreads + threadIdx.x;
      here[k] = i < n ? digits.at(i) : kOutside;
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (here[k] == kOutside) continue;
      if (here[k] != last) {
        if (run != 0) atomicAdd(&bins[last], run);
        last = here[k];
        run = 0;
      }
      ++run;
    }
  }
  if (run != 0) atomicAdd(&bins[last], run);
  __syncthreads();
  for (int bin = threadIdx.x; bin < kNumBins; bin += kThreads) {
    if (bins[bin] != 0) atomicAdd(&histogram[bin], static_cast<Count>(bins[bin]));
  }
}

// Sum of `values` over this thread and those behind it; shared: [kThreads].
template <typename V>
__device__ V sum_from_here_on(V value, V* shared) {
  const int t = threadIdx.x;
  shared[t] = value;
  for (int distance = 1; distance < kThreads; distance *= 2) {
    __syncthreads();
    const V other = t + distance < kThreads ? shared[t + distance] : V(0);
    __syncthreads();
    shared[t] += other;
  }
  return shared[t];
}

// One block. `search` one digit further: the largest digit with as many candidates at or above it as are to be kept.
__global__ void __launch_bounds__(kThreads)
    choose_digit_kernel(const int64_t* __restrict__ histogram, const int64_t* __restrict__ search, int width,
                        int64_t* __restrict__ result) {
  __shared__ int64_t shared[kThreads];
  const int64_t prefix = search[0], wanted = search[1];
  const int64_t* own = histogram + threadIdx.x * kOwnBins;
  int64_t here = 0;
  for (int bin = 0; bin < kOwnBins; ++bin) here += own[bin];
  const int64_t at_least = sum_from_here_on(here, shared);
  int64_t larger = at_least - here;  // candidates with a digit larger than this thread's
  // without candidates nobody has enough of them, and the digit is 0
  const bool is_first = threadIdx.x == 0;
  if (larger >= wanted || (at_least < wanted && !is_first)) return;
  int bin = kOwnBins - 1;
  while (bin > 0 && larger + own[bin] < wanted) larger += own[bin--];
  result[0] = prefix << width | (static_cast<int>(threadIdx.x) * kOwnBins + bin);
  result[1] = wanted - larger;
  result[2] = own[bin];
}

// A block for each chunk.
__global__ void __launch_bounds__(kThreads) count_equals_kernel(Cut cut, int64_t n, int64_t* __restrict__ counts) {
  __shared__ unsigned total;
  if (threadIdx.x == 0) total = 0;
  cut.start();
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kChunk, end = smaller(first + kChunk, n);
  unsigned own = 0;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) own += cut.equal(i);
  if (own != 0) atomicAdd(&total, own);
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// A sum over the block for each kind; thread 0 gets them. shared: [kNumSums][kThreads].
__device__ inline void sum_block(const double (&own)[kNumSums], double (*shared)[kThreads], double* result) {
  const int t = threadIdx.x;
#pragma unroll
  for (int sum = 0; sum < kNumSums; ++sum) shared[sum][t] = own[sum];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) {
#pragma unroll
      for (int sum = 0; sum < kNumSums; ++sum) shared[sum][t] += shared[sum][t + half];
    }
  }
  if (t == 0) {
#pragma unroll
    for (int sum = 0; sum < kNumSums; ++sum) result[sum] = shared[sum][0];
  }
}

// The sums of a block's chunk. Values are chosen, not multiplied by 0 or 1: what is left out may be NaN.
__device__ inline void sum_chunk(const ReportOf& report, const uint8_t* mask, int64_t n) {
  __shared__ double shared[kNumSums][kThreads];
  const int64_t first = int64_t{blockIdx.x} * kChunk, end = smaller(first + kChunk, n);
  const float previous = report.previous != nullptr ? *report.previous : 0.0f;
  double own[kNumSums] = {};
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    if (!report.valid[i]) continue;
    const double nll = report.sign * report.loss[i];
    own[kValid] += 1.0;
    if (mask[i]) {
      own[kKept] += 1.0;
      own[kNllKept] += nll;
    } else {
      own[kNllDropped] += nll;
    }
    if (report.reference != nullptr) {
      const double reference = report.reference[i];
      if (reference == reference) {
        own[kKnown] += 1.0;
        own[kReference] += reference;
        own[kExcess] += nll - reference;
      }
    }
    if (report.score != nullptr) {
      const float score = report.score[i];
      if (score != score) own[kNanScores] += 1.0;
      if (report.previous != nullptr && (score >= previous) == (mask[i] != 0)) own[kAgreeing] += 1.0;
    }
  }
  own[kNllValid] = own[kNllKept] + own[kNllDropped];
  sum_block(own, shared, report.partial + int64_t{blockIdx.x} * kNumSums);
}

// A block for each chunk. `starts` null: every equal is kept.
template <bool kReport>
__global__ void __launch_bounds__(kThreads)
    write_mask_kernel(Cut cut, const int64_t* __restrict__ starts, uint8_t* mask, ReportOf report, int64_t n) {
  cut.start();
  const int64_t first = int64_t{blockIdx.x} * kChunk, end = smaller(first + kChunk, n);
  if (starts == nullptr) {
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) mask[i] = cut.at_or_above(i);
  } else {
    __shared__ int shared[kThreads];
    const int64_t own = first + threadIdx.x * kOwnScores, own_end = smaller(own + kOwnScores, end);
    int equals = 0;
    for (int64_t i = own; i < own_end; ++i) equals += cut.equal(i);
    const int behind = sum_from_here_on(equals, shared);
    __syncthreads();
    int64_t position = starts[blockIdx.x] + shared[0] - behind;  // equals before this thread's
    const int64_t num_equal_kept = cut.num_equal_kept();
    for (int64_t i = own; i < own_end; ++i) {
      const bool equal = cut.equal(i);
      mask[i] = cut.above(i) || (equal && position < num_equal_kept);
      position += equal;
    }
  }
  if constexpr (kReport) {
    __syncthreads();  // the mask is read by other threads than wrote it
    sum_chunk(report, mask, n);
  }
}

// A block for each chunk.
__global__ void __launch_bounds__(kThreads) sum_chunk_kernel(ReportOf report, const uint8_t* mask, int64_t n) {
  sum_chunk(report, mask, n);
}

// One block.
__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(const double* __restrict__ partial, int64_t num_chunks, double* __restrict__ sums) {
  __shared__ double shared[kNumSums][kThreads];
  double own[kNumSums] = {};
  for (int64_t chunk = threadIdx.x; chunk < num_chunks; chunk += kThreads) {
#pragma unroll
    for (int sum = 0; sum < kNumSums; ++sum) own[sum] += partial[chunk * kNumSums + sum];
  }
  sum_block(own, shared, sums);
}

}  // namespace
}  // namespace megarpt::token_select::cuda
