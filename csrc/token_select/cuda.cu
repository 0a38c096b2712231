// How many threads of which kernel.
#include <algorithm>

#include "token_select/cuda_passes.hpp"
#include "token_select/cuda_scores.cuh"

namespace megarpt::token_select::cuda {
namespace {

// Blocks of a histogram: as many as the largest GPU holds at a time, for each is added to the others at its end.
constexpr int64_t kMostBlocks = 132 * 8;

unsigned num_chunks(int64_t n) { return static_cast<unsigned>((n + kChunk - 1) / kChunk); }

template <typename Digits>
void queue_histogram(const char* op, const Digits& digits, int64_t n, const Vector& histogram, std::uintptr_t stream) {
  if (n == 0) return;
  constexpr int64_t kOfBlock = kThreads * kInFlight;
  const int64_t blocks = std::min((n + kOfBlock - 1) / kOfBlock, kMostBlocks);
  launch(op, &histogram_kernel<Digits>, dim3(static_cast<unsigned>(blocks)), kThreads, stream, digits, n, blocks,
         histogram.as<Count>());
}

Cut cut_of(const Scores& scores, const Search& search) {
  return {scores.score.as<const float>(),
          scores.valid.as<const uint8_t>(),
          search.order.as<const int64_t>(),
          search.score.as<const uint64_t>(),
          search.order_search.as<const uint64_t>(),
          0,
          0};
}

ReportOf report_of(const Scores& scores, const Report& report) {
  return {scores.score.as<const float>(),    report.loss.as<const float>(),    report.reference.as<const float>(),
          report.previous.as<const float>(), scores.valid.as<const uint8_t>(), report.partial.row<double>(0),
          report.negate ? -1.0f : 1.0f};
}

void queue_total(const char* op, const Report& report, std::uintptr_t stream) {
  launch(op, &sum_chunks_kernel, dim3(1), kThreads, stream, report.partial.row<const double>(0), report.partial.rows,
         report.sums.as<double>());
}

}  // namespace

void score_excess(const Vector& logprob, const Vector& reference, const Scores& scores, const Vector& histogram,
                  std::uintptr_t stream) {
  const DigitsOfExcess digits = {logprob.as<const float>(), reference.as<const float>(), scores.valid.as<const uint8_t>(),
                                 scores.score.as<float>()};
  queue_histogram("token_select.score_excess", digits, logprob.size, histogram, stream);
}

void count_digits(const Scores& scores, const Vector& search, int shift, int width, const Vector& histogram,
                  std::uintptr_t stream) {
  const DigitsOfScores digits = {scores.score.as<const float>(), scores.valid.as<const uint8_t>(), search.as<const uint64_t>(),
                                 Digit{0, shift, width}};
  queue_histogram("token_select.count_digits", digits, scores.score.size, histogram, stream);
}

void count_order_digits(const Scores& scores, const Search& search, int shift, int width, const Vector& histogram,
                        std::uintptr_t stream) {
  const DigitsOfOrders digits = {scores.score.as<const float>(),
                                 scores.valid.as<const uint8_t>(),
                                 search.order.as<const int64_t>(),
                                 search.score.as<const uint64_t>(),
                                 search.order_search.as<const uint64_t>(),
                                 Digit{0, shift, width},
                                 0};
  queue_histogram("token_select.count_order_digits", digits, scores.score.size, histogram, stream);
}

void choose_digit(const Vector& histogram, const Vector& search, int width, const Vector& result, std::uintptr_t stream) {
  launch("token_select.choose_digit", &choose_digit_kernel, dim3(1), kThreads, stream, histogram.as<const int64_t>(),
         search.as<const int64_t>(), width, result.as<int64_t>());
}

void count_equals(const Scores& scores, const Search& search, const Vector& counts, std::uintptr_t stream) {
  const int64_t n = scores.score.size;
  if (n == 0) return;
  launch("token_select.count_equals", &count_equals_kernel, dim3(num_chunks(n)), kThreads, stream, cut_of(scores, search), n,
         counts.as<int64_t>());
}

void write_mask(const Scores& scores, const Search& search, const Vector& starts, const Vector& mask, const Report& report,
                std::uintptr_t stream) {
  constexpr const char* kOp = "token_select.write_mask";
  const int64_t n = scores.score.size;
  const auto kernel = report.sums ? &write_mask_kernel<true> : &write_mask_kernel<false>;
  if (n > 0) {
    launch(kOp, kernel, dim3(num_chunks(n)), kThreads, stream, cut_of(scores, search), starts.as<const int64_t>(),
           mask.as<uint8_t>(), report_of(scores, report), n);
  }
  if (report.sums) queue_total(kOp, report, stream);
}

void add_up(const Scores& scores, const Vector& mask, const Report& report, std::uintptr_t stream) {
  constexpr const char* kOp = "token_select.add_up";
  if (mask.size > 0) {
    launch(kOp, &sum_chunk_kernel, dim3(num_chunks(mask.size)), kThreads, stream, report_of(scores, report),
           mask.as<const uint8_t>(), mask.size);
  }
  queue_total(kOp, report, stream);
}

}  // namespace megarpt::token_select::cuda
