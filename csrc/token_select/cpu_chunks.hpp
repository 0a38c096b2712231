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

// Adds to `histogram` the digits that `fill(first, count, digits)` writes for each chunk; kNumBins stands for none. It returns
// false when nothing of the chunk competes.
template <typename Fill>
void add_histogram(int64_t n, int64_t* histogram, const Fill& fill) {
#pragma omp parallel if (n >= kParallel)
  {
    uint32_t bins[kCopies][kNumBins + 16] = {};  // 16: the bin for none, and rows that do not lie one above the other
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < num_chunks(n); ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min<int64_t>(kChunk, n - first);
      uint16_t digits[kChunk];
      if (!fill(first, count, digits)) continue;
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

bool fill_digits(const float* score, const uint8_t* valid, int64_t count, const Digit& digit, uint16_t* digits) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t of_key = digit.of(score_key(score[j]), kNumBins);
    digits[j] = static_cast<uint16_t>(valid[j] ? of_key : kNumBins);
  }
  return true;
}

void score_excess(const Vector& logprob, const Vector& reference, const Scores& scores, const Vector& histogram) {
  const float *lp = logprob.as<const float>(), *ref = reference.as<const float>();
  const auto* valid = scores.valid.as<const uint8_t>();
  float* score = scores.score.as<float>();
  const Digit digit{0, kFirstShift, kDigitBits};
  add_histogram(logprob.size, histogram.as<int64_t>(), [=](int64_t first, int64_t count, uint16_t* digits) {
#pragma omp simd
    for (int64_t i = first; i < first + count; ++i) score[i] = -lp[i] - ref[i];
    return fill_digits(score + first, valid + first, count, digit, digits);
  });
}

void count_digits(const Scores& scores, const Vector& search, int shift, int width, const Vector& histogram) {
  const float* score = scores.score.as<const float>();
  const auto* valid = scores.valid.as<const uint8_t>();
  const Digit digit{search.as<const uint64_t>()[0], shift, width};
  add_histogram(scores.score.size, histogram.as<int64_t>(), [=](int64_t first, int64_t count, uint16_t* digits) {
    return fill_digits(score + first, valid + first, count, digit, digits);
  });
}

void count_order_digits(const Scores& scores, const Search& search, int shift, int width, const Vector& histogram) {
  const float* score = scores.score.as<const float>();
  const auto* valid = scores.valid.as<const uint8_t>();
  const auto* order = search.order.as<const int64_t>();
  const auto kth = static_cast<uint32_t>(search.score.as<const uint64_t>()[0]);
  const Digit digit{search.order_search.as<const uint64_t>()[0], shift, width};
  add_histogram(scores.score.size, histogram.as<int64_t>(), [=](int64_t first, int64_t count, uint16_t* digits) {
    uint8_t equal[kChunk];
    int64_t num_equal = 0;
#pragma omp simd reduction(+ : num_equal)
    for (int64_t j = 0; j < count; ++j) {
      equal[j] = (valid[first + j] != 0) & (score_key(score[first + j]) == kth);
      num_equal += equal[j];
    }
    if (num_equal == 0) return false;  // as most often: scores of real models rarely repeat
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t of_key = digit.of(order_key(order[first + j]), kNumBins);
      digits[j] = static_cast<uint16_t>(equal[j] ? of_key : kNumBins);
    }
    return true;
  });
}

// Where the best k end.
struct Cut {
  const float* score;
  const uint8_t* valid;
  const int64_t* order;  // null: equals are not told apart by it
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
};

// Marks what is kept for certain and what is equal to the last that is kept, and returns how many the latter are. The cut is
// copied: a pointer to bytes may point to anything, so the compiler would read it again after every mark.
template <bool kOrdered>
int64_t mark(const Cut cut, int64_t first, int64_t count, uint8_t* above, uint8_t* equal) {
  int64_t num_equal = 0;
#pragma omp simd reduction(+ : num_equal)
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t key = score_key(cut.score[first + j]);
    bool larger = key > cut.kth, same = key == cut.kth;
    if constexpr (kOrdered) {
      const uint64_t key_of_order = order_key(cut.order[first + j]);
      larger = larger | (same & (key_of_order > cut.kth_order));
      same = same & (key_of_order == cut.kth_order);
    }
    const bool valid = cut.valid[first + j] != 0;
    above[j] = valid & larger;
    equal[j] = valid & same;
    num_equal += valid & same;
  }
  return num_equal;
}

int64_t mark(const Cut& cut, int64_t first, int64_t count, uint8_t* above, uint8_t* equal) {
  return cut.order ? mark<true>(cut, first, count, above, equal) : mark<false>(cut, first, count, above, equal);
}

void count_equals(const Scores& scores, const Search& search, const Vector& counts) {
  const Cut cut(scores, search);
  int64_t* result = counts.as<int64_t>();
  for_chunks(scores.score.size, [&](int64_t chunk, int64_t first, int64_t count) {
    uint8_t above[kChunk], equal[kChunk];
    result[chunk] = mark(cut, first, count, above, equal);
  });
}

void keep_all_equals(const Cut cut, int64_t first, int64_t count, uint8_t* mask) {
#pragma omp simd
  for (int64_t i = first; i < first + count; ++i) mask[i] = (cut.valid[i] != 0) & (score_key(cut.score[i]) >= cut.kth);
}

// `before`: equals of all ranks before this chunk's.
void keep_first_equals(const Cut& cut, int64_t before, int64_t first, int64_t count, uint8_t* mask) {
  uint8_t above[kChunk], equal[kChunk];
  const int64_t num_equal = mark(cut, first, count, above, equal), still_kept = cut.num_equal_kept - before;
  if (still_kept < num_equal) {  // of all chunks of all ranks in one only, and after it
    int64_t position = 0;
    for (int64_t j = 0; j < count; ++j) {
      const bool here = equal[j] != 0;
      equal[j] = here && position < still_kept;
      position += here;
    }
  }
  for (int64_t j = 0; j < count; ++j) mask[first + j] = above[j] | equal[j];
}

// A sum in as many parts as the widest vectors have, on any processor.
struct Lanes {
  double at[kLanes] = {};

  void add(const float* values, int64_t count) {
    for (int64_t j = 0; j < count; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) at[lane] += static_cast<double>(values[j + lane]);
    }
  }
  void add_difference(const float* values, const float* less, int64_t count) {
    for (int64_t j = 0; j < count; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        at[lane] += static_cast<double>(values[j + lane]) - static_cast<double>(less[j + lane]);
      }
    }
  }
  double total() const {
    double sum = 0.0;
    for (const double lane : at) sum += lane;
    return sum;
  }
};

// Values of one block that count, zero where they do not: chosen, not multiplied by 0 or 1, for what is left out may be NaN.
struct Block {
  static constexpr int64_t kSize = 512;  // they stay in the first-level cache
  float first[kSize], second[kSize];
  int64_t padded;  // count, up to whole lanes

  explicit Block(int64_t count) : padded((count + kLanes - 1) / kLanes * kLanes) {
    std::fill(first + count, first + padded, 0.0f);
    std::fill(second + count, second + padded, 0.0f);
  }
};

// Calls `body(first, count)` for the blocks of a chunk.
template <typename Body>
void for_blocks(int64_t count, const Body& body) {
  for (int64_t start = 0; start < count; start += Block::kSize) body(start, std::min(Block::kSize, count - start));
}

void add_losses(const float* loss, float sign, const uint8_t* valid, const uint8_t* mask, int64_t count, double* sums) {
  Lanes kept, dropped;
  int32_t num_valid = 0, num_kept = 0;
  for_blocks(count, [&](int64_t start, int64_t size) {
    Block block(size);
    const float* const x = loss + start;
    const uint8_t *const v = valid + start, *const m = mask + start;
    const float s = sign;
    int32_t valid_here = 0, kept_here = 0;
#pragma omp simd reduction(+ : valid_here, kept_here)
    for (int64_t j = 0; j < size; ++j) {
      const float nll = s * x[j];
      const int32_t is_valid = v[j], is_kept = v[j] & m[j];
      block.first[j] = is_kept ? nll : 0.0f;
      block.second[j] = is_valid > is_kept ? nll : 0.0f;
      valid_here += is_valid;
      kept_here += is_kept;
    }
    kept.add(block.first, block.padded);
    dropped.add(block.second, block.padded);
    num_valid += valid_here;
    num_kept += kept_here;
  });
  sums[kValid] = num_valid;
  sums[kKept] = num_kept;
  sums[kNllKept] = kept.total();
  sums[kNllDropped] = dropped.total();
  sums[kNllValid] = sums[kNllKept] + sums[kNllDropped];
}

void add_excess(const float* loss, float sign, const float* reference, const uint8_t* valid, int64_t count, double* sums) {
  Lanes references, excess;
  int32_t num_known = 0;
  for_blocks(count, [&](int64_t start, int64_t size) {
    Block block(size);
    const float *const x = loss + start, *const r = reference + start;
    const uint8_t* const v = valid + start;
    const float s = sign;
    int32_t known_here = 0;
#pragma omp simd reduction(+ : known_here)
    for (int64_t j = 0; j < size; ++j) {
      const float nll = s * x[j], ref = r[j];
      const int32_t known = v[j] & (ref == ref);
      block.first[j] = known ? nll : 0.0f;
      block.second[j] = known ? ref : 0.0f;
      known_here += known;
    }
    references.add(block.second, block.padded);
    excess.add_difference(block.first, block.second, block.padded);
    num_known += known_here;
  });
  sums[kReference] = references.total();
  sums[kKnown] = num_known;
  sums[kExcess] = excess.total();
}

void add_agreement(const float* score, const float* previous, const uint8_t* valid, const uint8_t* mask, int64_t count,
                   double* sums) {
  const float threshold = previous ? *previous : 0.0f;
  int32_t num_nan = 0, num_agreeing = 0;
#pragma omp simd reduction(+ : num_nan, num_agreeing)
  for (int64_t j = 0; j < count; ++j) {
    const int32_t at_least = score[j] >= threshold, is_nan = score[j] != score[j];
    num_nan += valid[j] & is_nan;
    num_agreeing += valid[j] & (at_least == mask[j]);
  }
  sums[kNanScores] = num_nan;
  if (previous) sums[kAgreeing] = num_agreeing;
}

void add_chunk(const Scores& scores, const uint8_t* mask, const Report& report, int64_t first, int64_t count, double* sums) {
  const uint8_t* valid = scores.valid.as<const uint8_t>() + first;
  const float* loss = report.loss.as<const float>() + first;
  const float sign = report.negate ? -1.0f : 1.0f;
  mask += first;
  std::fill(sums, sums + kNumSums, 0.0);
  add_losses(loss, sign, valid, mask, count, sums);
  if (report.reference) add_excess(loss, sign, report.reference.as<const float>() + first, valid, count, sums);
  if (scores.score) {
    add_agreement(scores.score.as<const float>() + first, report.previous.as<const float>(), valid, mask, count, sums);
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
      keep_first_equals(cut, starts.as<const int64_t>()[chunk], first, count, kept);
    } else {
      keep_all_equals(cut, first, count, kept);
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
