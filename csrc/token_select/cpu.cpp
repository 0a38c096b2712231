// What callers may get wrong, and which instruction set does the work.
#include "common/instruction_set.hpp"
#include "token_select/api.hpp"
#include "token_select/cpu_passes.hpp"
#include "token_select/cuda_passes.hpp"

namespace megarpt::token_select {
namespace {

const CpuPasses& passes() { return MEGARPT_BEST(passes)(); }

int64_t num_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

// Returns n.
int64_t check_scores(const char* op, const Scores& scores) {
  const int64_t n = scores.score.size;
  check_vector(op, "score", scores.score, n, DType::kFloat32);
  check_vector(op, "valid", scores.valid, n, DType::kBool);
  if (n > UINT32_MAX) fail(op, "score: got ", n, " scores, expected at most ", UINT32_MAX, " on a rank");
  return n;
}

void check_digit(const char* op, int bits, int shift, int width) {
  if (shift < 0 || width < 1 || width > kDigitBits || shift + width > bits) {
    fail(op, "digit: got ", width, " bits at ", shift, ", expected 1 to ", kDigitBits, " bits within ", bits);
  }
}

void check_search(const char* op, int64_t n, const Search& search) {
  check_vector(op, "search", search.score, 3, DType::kInt64);
  if (search.order) {
    check_vector(op, "order", search.order, n, DType::kInt64);
    check_vector(op, "order_search", search.order_search, 3, DType::kInt64);
  }
}

void check_report(const char* op, int64_t n, const Report& report) {
  check_vector(op, "loss", report.loss, n, DType::kFloat32);
  check_optional(op, "reference", report.reference, n, DType::kFloat32);
  check_optional(op, "previous threshold", report.previous, 1, DType::kFloat32);
  check_vector(op, "sums", report.sums, kNumSums, DType::kFloat64);
  const Matrix& partial = report.partial;
  if (partial.rows != num_chunks(n) || partial.cols != kNumSums || partial.dtype != DType::kFloat64) {
    fail(op, "partial: got ", name_of(partial.dtype), " [", partial.rows, ", ", partial.cols, "], expected float64 [",
         num_chunks(n), ", ", kNumSums, "]");
  }
}

}  // namespace

void score_excess(const Vector& logprob, const Vector& reference, const Scores& scores, const Vector& histogram,
                  const Place& place) {
  constexpr const char* kOp = "token_select.score_excess";
  const int64_t n = check_scores(kOp, scores);
  check_vector(kOp, "logprob", logprob, n, DType::kFloat32);
  check_vector(kOp, "reference", reference, n, DType::kFloat32);
  check_vector(kOp, "histogram", histogram, kNumBins, DType::kInt64);
  if (place.is_cuda) return cuda::score_excess(logprob, reference, scores, histogram, place.stream);
  passes().score_excess(logprob, reference, scores, histogram);
}

void count_digits(const Scores& scores, const Vector& search, int shift, int width, const Vector& histogram,
                  const Place& place) {
  constexpr const char* kOp = "token_select.count_digits";
  check_scores(kOp, scores);
  check_vector(kOp, "search", search, 3, DType::kInt64);
  check_digit(kOp, 32, shift, width);
  check_vector(kOp, "histogram", histogram, kNumBins, DType::kInt64);
  if (place.is_cuda) return cuda::count_digits(scores, search, shift, width, histogram, place.stream);
  passes().count_digits(scores, search, shift, width, histogram);
}

void count_order_digits(const Scores& scores, const Search& search, int shift, int width, const Vector& histogram,
                        const Place& place) {
  constexpr const char* kOp = "token_select.count_order_digits";
  const int64_t n = check_scores(kOp, scores);
  check_search(kOp, n, search);
  check_vector(kOp, "order", search.order, n, DType::kInt64);
  check_digit(kOp, 63, shift, width);
  check_vector(kOp, "histogram", histogram, kNumBins, DType::kInt64);
  if (place.is_cuda) return cuda::count_order_digits(scores, search, shift, width, histogram, place.stream);
  passes().count_order_digits(scores, search, shift, width, histogram);
}

void choose_digit(const Vector& histogram, const Vector& search, int width, const Vector& result, const Place& place) {
  constexpr const char* kOp = "token_select.choose_digit";
  check_vector(kOp, "histogram", histogram, kNumBins, DType::kInt64);
  check_vector(kOp, "search", search, 3, DType::kInt64);
  check_digit(kOp, kDigitBits, 0, width);
  check_vector(kOp, "result", result, 3, DType::kInt64);
  if (place.is_cuda) return cuda::choose_digit(histogram, search, width, result, place.stream);
  const auto *bins = histogram.as<const int64_t>(), *before = search.as<const int64_t>();
  int64_t larger = 0;  // candidates with a larger digit
  int digit = kNumBins - 1;
  while (digit > 0 && larger + bins[digit] < before[1]) larger += bins[digit--];
  int64_t* after = result.as<int64_t>();
  after[0] = before[0] << width | digit;
  after[1] = before[1] - larger;
  after[2] = bins[digit];
}

void count_equals(const Scores& scores, const Search& search, const Vector& counts, const Place& place) {
  constexpr const char* kOp = "token_select.count_equals";
  const int64_t n = check_scores(kOp, scores);
  check_search(kOp, n, search);
  check_vector(kOp, "counts", counts, num_chunks(n), DType::kInt64);
  if (place.is_cuda) return cuda::count_equals(scores, search, counts, place.stream);
  passes().count_equals(scores, search, counts);
}

void write_mask(const Scores& scores, const Search& search, const Vector& starts, const Vector& mask, const Report& report,
                const Place& place) {
  constexpr const char* kOp = "token_select.write_mask";
  const int64_t n = check_scores(kOp, scores);
  check_search(kOp, n, search);
  check_optional(kOp, "starts", starts, num_chunks(n), DType::kInt64);
  check_vector(kOp, "mask", mask, n, DType::kBool);
  if (report.sums) check_report(kOp, n, report);
  if (place.is_cuda) return cuda::write_mask(scores, search, starts, mask, report, place.stream);
  passes().write_mask(scores, search, starts, mask, report);
}

void add_up(const Scores& scores, const Vector& mask, const Report& report, const Place& place) {
  constexpr const char* kOp = "token_select.add_up";
  const int64_t n = mask.size;
  check_optional(kOp, "score", scores.score, n, DType::kFloat32);
  check_vector(kOp, "valid", scores.valid, n, DType::kBool);
  check_vector(kOp, "mask", mask, n, DType::kBool);
  check_report(kOp, n, report);
  if (place.is_cuda) return cuda::add_up(scores, mask, report, place.stream);
  passes().add_up(scores, mask, report);
}

}  // namespace megarpt::token_select
