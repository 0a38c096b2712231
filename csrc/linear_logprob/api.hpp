// The passes over a tile of logits around the matrix products of the language-model head. The products themselves are torch's
// (oneDNN, MKL, cuBLAS); megarpt/ops/head_tiles.py walks over the tiles. README.md has the mathematics.
//
// Dims: n rows of a tile (tokens), v columns (vocabulary entries). W is float, or double for double logits.
#pragma once

#include "common/tensor.hpp"

namespace megarpt::linear_logprob {

// What is known of every row's softmax after some of its columns, updated by every further tile.
//   largest [n] W       the largest logit so far (-inf before the first)
//   sum [n] double      sum of exp(z - largest)
//   weighted [n] double sum of (z - largest) exp(z - largest); not given when nobody asks for the entropy
//   target [n] W        the label's logit, once its column has passed
//   best [n] int64      the column of the largest logit, the first of equals
struct RowState {
  Vector largest, sum, weighted, target, best;
};

// Merge one tile into the state.
//
// logits [n, v]: z before division by the temperature. labels [n] int64: the label's column, negative where it is not here.
// first_column: of the tile, on the scale of labels and `best`.
// Reads the tile once from memory. NaN or +inf among a row's logits makes its sum NaN; -inf adds nothing, so that a row of
// nothing else keeps a sum of 0.
void add_tile(const Matrix& logits, const Vector& labels, int64_t first_column, double inverse_temperature,
              const RowState& state, const Place& place);

// The gradient of a tile of logits, for upstream gradients of log-probability and entropy that are folded into two numbers a
// row:  out = p (constant + slope log p),  log p = (z - largest) - log_sum.
// Two columns are not computed but given, because their digits would cancel: the label's, where out is nearly 1 - p, and that
// of the largest logit, whose p is nearly 1 in a peaked distribution and must not depend on how a second product of the same
// numbers was rounded.
struct RowGradient {
  Vector largest, log_sum, constant;  // [n] W
  Vector slope;                       // [n] W, or not given: 0
  Vector label, at_label;             // [n] int64, negative where not here; [n] W
  Vector best, at_best;               // the same for the largest logit
};

// source [m, v]: logits; row i of `out` comes from row rows[i] of it, or from row i when `rows` is not given.
// out [n, v]: the same type, or bfloat16 or float16 for float32 logits: the product that reads it wants half precision, while
// logits of single precision do not depend on how they were rounded. May be `source` when rows are not given and types are
// equal. An entry whose logit is -inf gets 0.
void write_gradient(const Matrix& source, const Vector& rows, int64_t first_column, double inverse_temperature,
                    const RowGradient& gradient, const Matrix& out, const Place& place);

// out [c, r] += source [r, c], or = when `overwrite`. Products whose left factor is transposed run at half speed in half
// precision on a CPU, so the weight's gradient is computed the other way round and turned here. CPU only.
void add_transposed(const Matrix& source, const Matrix& out, bool overwrite);

}  // namespace megarpt::linear_logprob
