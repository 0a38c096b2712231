// Half-precision numbers as bits, and an exponential the compiler can turn into vector instructions: no branches, no calls, no
// conversion that is undefined for NaN. Everything is in an unnamed namespace, because files that include this are compiled for
// different instruction sets and must not share code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/tensor.hpp"

namespace megarpt {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Calls `body` with a value of the element type.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Float16());
    case DType::kFloat64:
      return body(double());
    default:
      return;  // refused before
  }
}

// What the softmax of each element type is computed in.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // 112 = 127 - 15, the difference of the exponents' biases; infinity and NaN need it twice
  const uint32_t usual = magnitude + (112u << 23) + (exponent == 0x0f800000u ? 112u << 23 : 0u);
  const float subnormal = as_float(magnitude + (113u << 23)) - as_float(113u << 23);
  const uint32_t bits = exponent == 0 ? as_bits(subnormal) : usual;
  return as_float(bits | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
}

// Round to nearest, ties to even.
template <typename T>
inline T narrow(typename Wide<T>::type value);
template <>
inline double narrow<double>(double value) {
  return value;
}
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}
template <>
inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // below 2^-14 the addition of 0.5 shifts the digits that half precision drops out of the mantissa, rounding as it should
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t usual = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : usual;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<uint16_t>(sign | result)};
}

// e^x is 0 below this.
template <typename W>
constexpr W kUnderflow = sizeof(W) == sizeof(float) ? W(-87.3365) : W(-746);

// e^x within 2 units in the last place; 0 below -87.3, where e^x is subnormal; NaN for NaN. For x of at most 88.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the mantissa's low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;  // ln 2 in two parts
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;  // (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2]
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scaled = p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
  return x < kUnderflow<float> ? 0.0f : scaled;
}
inline double exponential(double x) { return std::exp(x); }

}  // namespace
}  // namespace megarpt
