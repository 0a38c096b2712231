// What callers may get wrong, and which instruction set does the work.
#include "cached_attention/api.hpp"
#include "cached_attention/cpu_passes.hpp"
#include "common/instruction_set.hpp"

namespace megarpt::cached_attention {
namespace {

constexpr const char* kOp = "cached_attention.attend_step";

template <int kDims>
void check(const char* name, const Strided<kDims>& array, DType dtype, const std::array<int64_t, kDims>& sizes) {
  if (array.dtype != dtype || array.sizes != sizes) {
    fail(kOp, name, ": got ", name_of(array.dtype), " ", text_of(array.sizes), ", expected ", name_of(dtype), " ",
         text_of(sizes));
  }
}

void check_within(const char* name, const Vector& vector, int64_t size, int64_t lowest, int64_t highest) {
  check_vector(kOp, name, vector, size, DType::kInt64);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t value = vector.as<const int64_t>()[i];
    if (value < lowest || value > highest) {
      fail(kOp, name, ": got ", value, " at ", i, ", expected ", lowest, " to ", highest);
    }
  }
}

}  // namespace

void attend_step(const Strided<4>& query, const Strided<4>& keys_values, const Cache& cache, double scale,
                 const Strided<4>& out) {
  const DType dtype = query.dtype;
  check_floating(kOp, "query", dtype);
  const auto [n, ng, g, hn] = query.sizes;
  if (hn < 1 || hn > kMaxHeadSize) fail(kOp, "query: got heads of ", hn, ", expected 1 to ", kMaxHeadSize);
  check<4>("keys_values", keys_values, dtype, {n, ng, 2, hn});
  check<4>("out", out, dtype, query.sizes);
  const int64_t p = cache.prompts.sizes[0], c_own = cache.own.sizes[3], c_prompt = cache.prompts.sizes[3];
  check<5>("own", cache.own, dtype, {n, ng, 2, c_own, hn});
  check<5>("prompts", cache.prompts, dtype, {p, ng, 2, c_prompt, hn});
  check_within("lengths", cache.lengths, n, 1, c_own);
  check_within("prompt_lengths", cache.prompt_lengths, p, 1, c_prompt);
  check_within("prompt_of", cache.prompt_of, n, 0, p - 1);
  MEGARPT_BEST(attend_step)(query, keys_values, cache, scale, out);
}

}  // namespace megarpt::cached_attention
