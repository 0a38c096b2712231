// Scores and positions as unsigned integers that sort alike, on CPU and GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEGARPT_EVERYWHERE __host__ __device__ inline
#else
#define MEGARPT_EVERYWHERE inline
#endif

namespace megarpt::token_select {
namespace {

// NaN of either sign is 0, the lowest; then -inf; -0.0 and +0.0 are one. Integers throughout, so that denormals keep their
// order where the processor is set to flush them.
MEGARPT_EVERYWHERE uint32_t score_key(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  bits = bits == 0x80000000u ? 0u : bits;
  const uint32_t all_if_negative = 0u - (bits >> 31);  // negative floats sort backwards as integers
  const uint32_t key = bits ^ (all_if_negative | 0x80000000u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0u : key;
}

// Largest for order 0.
MEGARPT_EVERYWHERE uint64_t order_key(int64_t order) { return 0x7fffffffffffffffu - static_cast<uint64_t>(order); }

// Where one digit of a key is and what the digits before it must be.
struct Digit {
  uint64_t prefix;
  int shift, width;

  // `outside` unless the key starts with the prefix. Key: uint32_t of a score, uint64_t of an order.
  template <typename Key>
  MEGARPT_EVERYWHERE uint32_t of(Key key, uint32_t outside) const {
    const Key head = key >> shift, mask = (Key(1) << width) - 1;
    return (head & ~mask) == static_cast<Key>(prefix << width) ? static_cast<uint32_t>(head & mask) : outside;
  }
};

}  // namespace
}  // namespace megarpt::token_select
