// The CPU's pass, one key/value head of one sequence after another. Included by one file per instruction set, which says what
// `MEGARPT_ISA` is.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "cached_attention/cpu_passes.hpp"
#include "common/numbers.hpp"

namespace megarpt::cached_attention::MEGARPT_ISA {
namespace {

constexpr int64_t kKeys = 64;         // whose scores are taken together; their wide copy stays in the first-level cache
constexpr int64_t kParallel = 32768;  // fewer entries of the stores than this are not worth waking other threads

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// One vector register of numbers.
template <typename W>
struct Lanes {
  typedef W Numbers __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kCount = kVectorBytes / sizeof(W);
  Numbers at = {};

  static Lanes load(const W* from) {
    Lanes lanes;
    std::memcpy(&lanes.at, from, kVectorBytes);
    return lanes;
  }
  void store(W* to) const { std::memcpy(to, &at, kVectorBytes); }
};

// sums[r] = the sum of the kWidth numbers of row r. In halves: the sums of half the width are as many vectors again.
template <int kWidth, typename W>
void add_up(const W* rows, int64_t count, W* sums) {
  if constexpr (kWidth <= 4) {
#pragma omp simd
    for (int64_t r = 0; r < count; ++r) {
      W sum = rows[r * kWidth] + rows[r * kWidth + kWidth / 2];
      if (kWidth == 4) sum += rows[r * kWidth + 1] + rows[r * kWidth + 3];
      sums[r] = sum;
    }
  } else {
    constexpr int kHalf = kWidth / 2;
    alignas(64) W halves[kKeys * kHalf];
    for (int64_t r = 0; r < count; ++r) {
      for (int lane = 0; lane < kHalf; ++lane) {
        halves[r * kHalf + lane] = rows[r * kWidth + lane] + rows[r * kWidth + kHalf + lane];
      }
    }
    add_up<kHalf>(halves, count, sums);
  }
}

template <typename W>
constexpr int64_t whole_lanes(int64_t count) {
  return (count + Lanes<W>::kCount - 1) / Lanes<W>::kCount * Lanes<W>::kCount;
}

// `count` wide numbers of `from` times `scale`, and zeros up to whole lanes.
template <typename T, typename W>
void copy_wide(const T* from, int64_t count, W scale, W* to) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c]) * scale;
  for (int64_t c = count; c < whole_lanes<W>(count); ++c) to[c] = 0;
}

// Keys or values of some positions, `stride` entries apart.
template <typename T>
struct Positions {
  const T* data;
  int64_t stride;

  const T* operator[](int64_t position) const { return data + position * stride; }
};

// The first `count` positions as wide numbers in whole lanes: where they lie, if they are so already, or in `room`.
template <typename T, typename W>
Positions<W> widened(const Positions<T>& from, int64_t count, int64_t hn, W* room) {
  const int64_t width = whole_lanes<W>(hn);
  if constexpr (std::is_same_v<T, W>) {
    if (hn == width) return from;
  }
  for (int64_t j = 0; j < count; ++j) copy_wide(from[j], hn, W(1), room + j * width);
  return {room, width};
}

// What some queries have attended to so far: sums counted from the largest score, as linear_logprob/README.md has it.
template <typename W, int kQueries>
struct Softmax {
  static constexpr int kKeysAtOnce = kQueries == 4 ? 2 : 4;     // eight sums in registers hide the latency of an addition
  static constexpr int kColumnsAtOnce = kQueries == 4 ? 2 : 4;  // vectors of them
  using L = Lanes<W>;

  int64_t width;  // of a head, in whole lanes
  alignas(64) W query[kQueries][kMaxHeadSize];
  alignas(64) W values[kQueries][kMaxHeadSize];     // sum of exp(score - largest) * value
  alignas(64) W weight[kQueries][kKeys];            // of the keys at hand: scores, then exponentials
  alignas(64) W parts[kQueries][kKeys][L::kCount];  // of the scores
  L sum[kQueries];
  W largest[kQueries], factor[kQueries];

  explicit Softmax(int64_t width) : width(width) {
    for (int a = 0; a < kQueries; ++a) {
      largest[a] = -std::numeric_limits<W>::infinity();
      for (int64_t c = 0; c < width; ++c) values[a][c] = 0;
    }
  }

  void add(const Positions<W>& keys, int64_t count) {
    int64_t j = 0;
    for (; j + kKeysAtOnce <= count; j += kKeysAtOnce) score<kKeysAtOnce>(keys, j);
    for (; j < count; ++j) score<1>(keys, j);
    for (; j < kKeys; ++j) {
      for (int a = 0; a < kQueries; ++a) weight[a][j] = -std::numeric_limits<W>::infinity();
    }
    for (int a = 0; a < kQueries; ++a) {
      add_up<L::kCount>(parts[a][0], count, weight[a]);
      exponentiate(a);
    }
  }

  W total(int a) const {
    alignas(64) W lanes[L::kCount];
    W total;
    sum[a].store(lanes);
    add_up<L::kCount>(lanes, 1, &total);
    return total;
  }

  void add_values(const Positions<W>& from, int64_t count) {
    int64_t c = 0;
    for (; c + kColumnsAtOnce * L::kCount <= width; c += kColumnsAtOnce * L::kCount) {
      weigh<kColumnsAtOnce>(from, count, c);
    }
    for (; c < width; c += L::kCount) weigh<1>(from, count, c);
  }

 private:
  template <int kCount>
  void score(const Positions<W>& keys, int64_t first) {
    L sums[kCount][kQueries];
    for (int64_t c = 0; c < width; c += L::kCount) {
      L q[kQueries];
      for (int a = 0; a < kQueries; ++a) q[a] = L::load(query[a] + c);
      for (int i = 0; i < kCount; ++i) {
        const L key = L::load(keys[first + i] + c);
        for (int a = 0; a < kQueries; ++a) sums[i][a].at += q[a].at * key.at;
      }
    }
    for (int i = 0; i < kCount; ++i) {
      for (int a = 0; a < kQueries; ++a) sums[i][a].store(parts[a][first + i]);
    }
  }

  void exponentiate(int a) {
    W* const w = weight[a];
    W tops[kKeys / 2];
    for (int64_t j = 0; j < kKeys / 2; ++j) tops[j] = w[j] > w[j + kKeys / 2] ? w[j] : w[j + kKeys / 2];
    for (int64_t half = kKeys / 4; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) tops[j] = tops[j] > tops[j + half] ? tops[j] : tops[j + half];
    }
    const W top = tops[0] > largest[a] ? tops[0] : largest[a];
    // -inf counted from itself would be NaN
    const W origin = top == -std::numeric_limits<W>::infinity() ? W(0) : top;
#pragma omp simd
    for (int64_t j = 0; j < kKeys; ++j) w[j] = exponential(w[j] - origin);
    factor[a] = exponential(largest[a] - origin);
    sum[a].at *= factor[a];
    for (int64_t j = 0; j < kKeys; j += L::kCount) sum[a].at += L::load(w + j).at;
    largest[a] = top;
  }

  template <int kCount>
  void weigh(const Positions<W>& from, int64_t count, int64_t c) {
    L sums[kCount][kQueries];
    for (int i = 0; i < kCount; ++i) {
      for (int a = 0; a < kQueries; ++a) sums[i][a].at = L::load(values[a] + c + i * L::kCount).at * factor[a];
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int i = 0; i < kCount; ++i) {
        const L value = L::load(from[j] + c + i * L::kCount);
        for (int a = 0; a < kQueries; ++a) sums[i][a].at += value.at * weight[a][j];
      }
    }
    for (int i = 0; i < kCount; ++i) {
      for (int a = 0; a < kQueries; ++a) sums[i][a].store(values[a] + c + i * L::kCount);
    }
  }
};

// Keys and values of a row for one head.
template <typename T>
struct Row {
  Positions<T> keys, values;
  int64_t length;

  Row(const Strided<5>& store, int64_t row, int64_t head, int64_t length)
      : keys{store.at<const T>(row, head, 0), store.strides[3]},
        values{store.at<const T>(row, head, 1), store.strides[3]},
        length(length) {}
};

// The next kQueries queries of a head, `from` and `to` being the first one's.
template <int kQueries, typename T>
void attend(const T* from, int64_t from_stride, const Row<T> (&rows)[2], int64_t hn, typename Wide<T>::type scale, T* to,
            int64_t to_stride) {
  using W = typename Wide<T>::type;
  Softmax<W, kQueries> softmax(whole_lanes<W>(hn));
  alignas(64) W room[kKeys * kMaxHeadSize];
  for (int a = 0; a < kQueries; ++a) copy_wide(from + a * from_stride, hn, scale, softmax.query[a]);
  for (const Row<T>& row : rows) {
    for (int64_t first = 0; first < row.length; first += kKeys) {
      const int64_t count = row.length - first < kKeys ? row.length - first : kKeys;
      softmax.add(widened(Positions<T>{row.keys[first], row.keys.stride}, count, hn, room), count);
      softmax.add_values(widened(Positions<T>{row.values[first], row.values.stride}, count, hn, room), count);
    }
  }
  for (int a = 0; a < kQueries; ++a) {
    const W inverse = W(1) / softmax.total(a);
#pragma omp simd
    for (int64_t c = 0; c < hn; ++c) to[a * to_stride + c] = narrow<T>(softmax.values[a][c] * inverse);
  }
}

template <typename T>
void attend_step(const Strided<4>& query, const Strided<4>& keys_values, const Cache& cache, double scale,
                 const Strided<4>& out) {
  const int64_t n = query.sizes[0], ng = query.sizes[1], g = query.sizes[2], hn = query.sizes[3];
  const int64_t *lengths = cache.lengths.as<const int64_t>(), *prompt_of = cache.prompt_of.as<const int64_t>();
  const int64_t* prompt_lengths = cache.prompt_lengths.as<const int64_t>();
  const int64_t entries = n * ng * (cache.own.sizes[3] + cache.prompts.sizes[3]) * hn;
#pragma omp parallel for schedule(static, 1) if (entries >= kParallel)
  for (int64_t pair = 0; pair < n * ng; ++pair) {
    const int64_t i = pair / ng, head = pair % ng, prompt = prompt_of[i];
    for (int64_t part = 0; part < 2; ++part) {
      T* to = cache.own.at<T>(i, head, part) + (lengths[i] - 1) * cache.own.strides[3];
      std::memcpy(to, keys_values.at<const T>(i, head, part), hn * sizeof(T));
    }
    const Row<T> rows[2] = {{cache.prompts, prompt, head, prompt_lengths[prompt]}, {cache.own, i, head, lengths[i]}};
    const T* from = query.at<const T>(i, head, 0);
    T* to = out.at<T>(i, head, 0);
    const auto some = [&, from_stride = query.strides[2], to_stride = out.strides[2]](auto count, int64_t first) {
      attend<decltype(count)::value>(from + first * from_stride, from_stride, rows, hn,
                                     static_cast<typename Wide<T>::type>(scale), to + first * to_stride, to_stride);
    };
    int64_t first = 0;
    for (; first + 4 <= g; first += 4) some(std::integral_constant<int, 4>(), first);
    for (; first + 2 <= g; first += 2) some(std::integral_constant<int, 2>(), first);
    for (; first < g; ++first) some(std::integral_constant<int, 1>(), first);
  }
}

}  // namespace

void attend_step(const Strided<4>& query, const Strided<4>& keys_values, const Cache& cache, double scale,
                 const Strided<4>& out) {
  with_type(query.dtype, [&](auto of) { attend_step<decltype(of)>(query, keys_values, cache, scale, out); });
}

}  // namespace megarpt::cached_attention::MEGARPT_ISA
