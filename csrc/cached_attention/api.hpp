// One step of decoding: a new token of each sequence is written to a store of keys and values, and attends to it. README.md has
// the method. CPU only.
//
// Dims: n sequences, p prompts, ng key/value heads, g query heads of each, hn head size, c_own and c_prompt positions of the
// stores.
#pragma once

#include "common/tensor.hpp"

namespace megarpt::cached_attention {

constexpr int64_t kMaxHeadSize = 512;

// Keys and values of one layer, keys first. Where nothing is written yet nothing is read.
struct Cache {
  Strided<5> own;         // [n, ng, 2, c_own, hn]
  Vector lengths;         // [n] int64, 1 to c_own, the new token included
  Strided<5> prompts;     // [p, ng, 2, c_prompt, hn]
  Vector prompt_lengths;  // [p] int64, 1 to c_prompt
  Vector prompt_of;       // [n] int64, 0 to p - 1
};

// keys_values [n, ng, 2, hn] -> cache.own, at position length - 1 of each sequence's row; then
// out [n, ng, g, hn] = softmax(scale * query . keys) values, over all of the sequence's prompt and of its own row.
// query [n, ng, g, hn]. All of one floating type.
void attend_step(const Strided<4>& query, const Strided<4>& keys_values, const Cache& cache, double scale,
                 const Strided<4>& out);

}  // namespace megarpt::cached_attention
