// The CPU's passes. Included by one file per instruction set, which says what `MEGARPT_ISA` is.
//
// Counts are integers, and sums are taken chunk by chunk in lanes of a fixed number, so neither the number of threads nor the
// instruction set changes a bit of any result.
#pragma once

#include <algorithm>

#include "token_select/cpu_passes.hpp"
#include "token_select/keys.hpp"

namespace megarpt::token_select::MEGARPT_ISA {
namespace {

constexpr int64_t kParallel = 65536;  // fewer scores than this are not worth waking other threads
constexpr int kCopies = 4;            // of a histogram: a counter that has just been written is slow to read again
constexpr int kLanes = 8;

int64_t num_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

// Calls `body(chunk, first, count)` for all chunks of n entries, on all threads.
template <typename Body>
void for_chunks(int64_t n, const Body& body) {
#pragma omp parallel for schedule(static) if (n >= kParallel)
  for (int64_t chunk = 0; chunk < num_chunks(n); ++chunk) {
    const int64_t first = chunk * kChunk;
    body(chunk, first, std::min<int64_t>(kChunk, n - first));
  }
}

// Adds to `histogram` the digits that `fill(first, count, digits)` writes for each chunk; kNumBins stands for none.
template <typename Fill>
void add_histogram(int64_t n, int64_t* histogram, const Fill& fill) {
#pragma omp parallel if (n >= kParallel)
  {
    uint32_t bins[kCopies][kNumBins + 16] = {};  // 16: the bin for none, and rows that do not lie one above the other
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < num_chunks(n); ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min<int64_t>(kChunk, n - first);
      uint16_t digits[kChunk];
      fill(first, count, digits);
      int64_t j = 0;
      for (; j + kCopies <= count; j += kCopies) {
        for (int copy = 0; copy < kCopies; ++copy) ++bins[copy][digits[j + copy]];
      }
      for (; j < count; ++j) ++bins[0][digits[j]];
    }
#pragma omp critical(megarpt_token_select_histogram)
    for (int bin = 0; bin < kNumBins; ++bin) {
      for (int copy = 0; copy < kCopies; ++copy) histogram[bin] += bins[copy][bin];
    }
  }
}

void fill_digits(const float* score, const uint8_t* valid, int64_t count, const Digit& digit, uint16_t* digits) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t of_key = digit.of(score_key(score[j]), kNumBins);
    digits[j] = static_cast<uint16_t>(valid[j] ? of_key : kNumBins);
  }
}

void score_excess(const Vector& logprob, const Vector& reference, const Scores& scores, const Vector& histogram) {
  const float *lp = logprob.as<const float>(), *ref = reference.as<const float>();
  const auto* valid = scores.valid.as<const uint8_t>();
  float* score = scores.score.as<float>();
  const Digit digit{0, kFirstShift, kDigitBits};
  add_histogram(logprob.size, histogram.as<int64_t>(), [=](int64_t first, int64_t count, uint16_t* digits) {
#pragma omp simd
    for (int64_t i = first; i < first + count; ++i) score[i] = -lp[i] - ref[i];
    fill_digits(score + first, valid + first, count, digit, digits);
  });
}

void count_digits(const Scores& scores, const Vector& search, int shift, int width, const Vector& histogram) {
  const float* score = scores.score.as<const float>();
  const auto* valid = scores.valid.as<const uint8_t>();
  const Digit digit{search.as<const uint64_t>()[0], shift, width};
  add_histogram(scores.score.size, histogram.as<int64_t>(), [=](int64_t first, int64_t count, uint16_t* digits) {
    fill_digits(score + first, valid + first, count, digit, digits);
  });
}

void count_order_digits(const Scores& scores, const Search& search, int shift, int width, const Vector& histogram) {
  const float* score = scores.score.as<const float>();
  const auto* valid = scores.valid.as<const uint8_t>();
  const auto* order = search.order.as<const int64_t>();
  const auto kth = static_cast<uint32_t>(search.score.as<const uint64_t>()[0]);
  const Digit digit{search.order_search.as<const uint64_t>()[0], shift, width};
  add_histogram(scores.score.size, histogram.as<int64_t>(), [=](int64_t first, int64_t count, uint16_t* digits) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = first + j;
      const uint32_t of_key = digit.of(order_key(order[i]), kNumBins);
      digits[j] = static_cast<uint16_t>(valid[i] && score_key(score[i]) == kth ? of_key : kNumBins);
    }
  });
}

// Where the best k end. Of a score: kept for certain, out for certain, or equal to the last that is kept.
struct Cut {
  const float* score;
  const uint8_t* valid;
  const int64_t* order;
  uint32_t kth;
  uint64_t kth_order;
  int64_t num_equal_kept;

  Cut(const Scores& scores, const Search& search)
      : score(scores.score.as<const float>()),
        valid(scores.valid.as<const uint8_t>()),
        order(search.order.as<const int64_t>()),
        kth(static_cast<uint32_t>(search.score.as<const uint64_t>()[0])),
        kth_order(search.order ? search.order_search.as<const uint64_t>()[0] : 0),
        num_equal_kept((search.order ? search.order_search : search.score).as<const int64_t>()[1]) {}

  bool above(int64_t i) const {
    const uint32_t key = score_key(score[i]);
    return valid[i] && (key > kth || (key == kth && order && order_key(order[i]) > kth_order));
  }
  bool equal(int64_t i) const { return valid[i] && score_key(score[i]) == kth && (!order || order_key(order[i]) == kth_order); }
};

void count_equals(const Scores& scores, const Search& search, const Vector& counts) {
  const Cut cut(scores, search);
  int64_t* result = counts.as<int64_t>();
  for_chunks(scores.score.size, [&](int64_t chunk, int64_t first, int64_t count) {
    int64_t equals = 0;
    for (int64_t i = first; i < first + count; ++i) equals += cut.equal(i);
    result[chunk] = equals;
  });
}

// Calls `add(index, lane)` for `count` indices, in groups that a compiler can turn into vector instructions.
template <typename Add>
inline void in_lanes(int64_t count, const Add& add) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) add(j + lane, lane);
  }
  for (int lane = 0; j + lane < count; ++lane) add(j + lane, lane);
}

template <typename T>
inline double total(const T (&lanes)[kLanes]) {
  double sum = 0.0;
  for (const T lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

// The sums of one chunk. Values are chosen, not multiplied by 0 or 1: what is left out may be NaN.
void add_chunk(const Scores& scores, const uint8_t* mask, const Report& report, int64_t first, int64_t count, double* sums) {
  const uint8_t* valid = scores.valid.as<const uint8_t>() + first;
  const float* loss = report.loss.as<const float>() + first;
  const float sign = report.negate ? -1.0f : 1.0f;
  mask += first;
  double kept[kLanes] = {}, dropped[kLanes] = {};
  int32_t num_valid[kLanes] = {}, num_kept[kLanes] = {};
  in_lanes(count, [&](int64_t j, int lane) {
    const double nll = sign * loss[j];
    kept[lane] += valid[j] & mask[j] ? nll : 0.0;
    dropped[lane] += valid[j] & ~mask[j] ? nll : 0.0;
    num_valid[lane] += valid[j];
    num_kept[lane] += valid[j] & mask[j];
  });
  sums[kValid] = total(num_valid);
  sums[kKept] = total(num_kept);
  sums[kNllKept] = total(kept);
  sums[kNllDropped] = total(dropped);
  sums[kNllValid] = sums[kNllKept] + sums[kNllDropped];
  sums[kNanScores] = sums[kReference] = sums[kKnown] = sums[kExcess] = sums[kAgreeing] = 0.0;
  if (report.reference) {
    const float* reference = report.reference.as<const float>() + first;
    double references[kLanes] = {}, excess[kLanes] = {};
    int32_t num_known[kLanes] = {};
    in_lanes(count, [&](int64_t j, int lane) {
      const bool known = valid[j] & (reference[j] == reference[j]);
      const double ref = reference[j], above = sign * loss[j] - ref;
      references[lane] += known ? ref : 0.0;
      excess[lane] += known ? above : 0.0;
      num_known[lane] += known;
    });
    sums[kReference] = total(references);
    sums[kExcess] = total(excess);
    sums[kKnown] = total(num_known);
  }
  if (scores.score) {
    const float* score = scores.score.as<const float>() + first;
    int32_t num_nan[kLanes] = {}, num_agreeing[kLanes] = {};
    const float previous = report.previous ? report.previous.as<const float>()[0] : 0.0f;
    in_lanes(count, [&](int64_t j, int lane) {
      num_nan[lane] += valid[j] & (score[j] != score[j]);
      num_agreeing[lane] += valid[j] & ((score[j] >= previous) == (mask[j] != 0));
    });
    sums[kNanScores] = total(num_nan);
    if (report.previous) sums[kAgreeing] = total(num_agreeing);
  }
}

// Chunks in their own order, whoever computed them.
void add_partials(const Report& report) {
  double* sums = report.sums.as<double>();
  std::fill(sums, sums + kNumSums, 0.0);
  for (int64_t chunk = 0; chunk < report.partial.rows; ++chunk) {
    for (int sum = 0; sum < kNumSums; ++sum) sums[sum] += report.partial.row<const double>(chunk)[sum];
  }
}

void write_mask(const Scores& scores, const Search& search, const Vector& starts, const Vector& mask, const Report& report) {
  const Cut cut(scores, search);
  uint8_t* kept = mask.as<uint8_t>();
  for_chunks(scores.score.size, [&](int64_t chunk, int64_t first, int64_t count) {
    if (starts) {
      int64_t before = starts.as<const int64_t>()[chunk];
      for (int64_t i = first; i < first + count; ++i) {
        const bool equal = cut.equal(i);
        kept[i] = cut.above(i) || (equal && before < cut.num_equal_kept);
        before += equal;
      }
    } else {
#pragma omp simd
      for (int64_t i = first; i < first + count; ++i) kept[i] = cut.valid[i] & (score_key(cut.score[i]) >= cut.kth);
    }
    if (report.sums) add_chunk(scores, kept, report, first, count, report.partial.row<double>(chunk));
  });
  if (report.sums) add_partials(report);
}

void add_up(const Scores& scores, const Vector& mask, const Report& report) {
  for_chunks(mask.size, [&](int64_t chunk, int64_t first, int64_t count) {
    add_chunk(scores, mask.as<const uint8_t>(), report, first, count, report.partial.row<double>(chunk));
  });
  add_partials(report);
}

}  // namespace

const CpuPasses& passes() {
  static const CpuPasses kPasses{score_excess, count_digits, count_order_digits, count_equals, write_mask, add_up};
  return kPasses;
}

}  // namespace megarpt::token_select::MEGARPT_ISA
