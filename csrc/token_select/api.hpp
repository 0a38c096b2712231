// The passes over one rank's scores from which megarpt/ops/token_select.py puts an exact global selection together: count the
// next digit, (sum the counts over ranks,) choose it, and at the end write the mask. README.md has the method.
//
// Dims: n scores on this rank, c = ceil(n / kChunk) chunks of them.
#pragma once

#include "common/tensor.hpp"

namespace megarpt::token_select {

constexpr int kDigitBits = 11;                        // at most; README.md has the measurement
constexpr int kNumBins = 1 << kDigitBits;             // of every histogram
constexpr int kChunk = 4096;                          // scores whose partial sums and counts belong together, on every device
constexpr int kScoreBits = 32;                        // of a score's key
constexpr int kFirstShift = kScoreBits - kDigitBits;  // of a score's leading digit

// What every pass reads. score [n] float32; valid [n] bool: which of them compete.
struct Scores {
  Vector score, valid;
};

// How far a search for the k-th largest key has come, [3] int64 each: the digits known so far, how many keys that start with
// them belong to the best k, and how many start with them at all. `order` is for scores equal to the k-th: of those, whose
// order is smaller. It and its search are given together or not at all.
struct Search {
  Vector score;
  Vector order;         // [n] int64, non-negative where valid
  Vector order_search;  // [3] int64
};

enum Sum { kValid, kKept, kNllValid, kNllKept, kNllDropped, kNanScores, kReference, kKnown, kExcess, kAgreeing, kNumSums };

// Sums over valid tokens, for the log; a sum whose input is not given is 0.
struct Report {
  Vector loss;  // [n] float32: nll, or with `negate` log-probability
  bool negate = false;
  Vector reference;  // [n] float32, or not given: nll under the reference, NaN where unknown
  Vector previous;   // [] float32 as [1], or not given: threshold of another selection to agree with
  Matrix partial{};  // [c, kNumSums] float64, room to work in
  Vector sums;       // [kNumSums] float64
};

// score = -logprob - reference [n], and histogram [kNumBins] int64 += counts of its leading digit among valid scores.
void score_excess(const Vector& logprob, const Vector& reference, const Scores& scores, const Vector& histogram,
                  const Place& place);

// histogram [kNumBins] int64 += counts of the digit of `width` bits at `shift`, among valid scores whose key starts with the
// digits of `search`.
void count_digits(const Scores& scores, const Vector& search, int shift, int width, const Vector& histogram,
                  const Place& place);

// The same for `order` among valid scores whose key is the one found. Smaller orders have larger keys.
void count_order_digits(const Scores& scores, const Search& search, int shift, int width, const Vector& histogram,
                        const Place& place);

// result [3] = search, one digit further.
void choose_digit(const Vector& histogram, const Vector& search, int width, const Vector& result, const Place& place);

// counts [c] int64: scores of each chunk that score and order leave equal to the last that is kept.
void count_equals(const Scores& scores, const Search& search, const Vector& counts, const Place& place);

// mask [n] bool: the best k. `starts` [c] int64: how many equals of all ranks come before each chunk's; not given when every
// equal is kept. With a report (one whose `sums` are given) its sums come out of the same pass.
void write_mask(const Scores& scores, const Search& search, const Vector& starts, const Vector& mask, const Report& report,
                const Place& place);

// The sums of a report for a mask that is there already. `score` may be not given.
void add_up(const Scores& scores, const Vector& mask, const Report& report, const Place& place);

}  // namespace megarpt::token_select
