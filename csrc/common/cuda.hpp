// What a kernel and its launch need of CUDA, and nothing else: numbers and their conversions, the shape of 16-byte accesses,
// the launch. tests/csrc/cuda_on_cpu has a file of this name that lets the same kernels run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/tensor.hpp"

namespace megarpt {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

namespace {

// What the softmax of each element type is computed in.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(BFloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(Float16 value) { return __half2float(value); }

// Round to nearest, ties to even.
template <typename T>
__device__ T narrow(typename Wide<T>::type value);
template <>
__device__ inline double narrow<double>(double value) {
  return value;
}
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline Float16 narrow<Float16>(float value) {
  return __float2half_rn(value);
}

// e^x within 2 units in the last place on the whole range, by CUDA's documentation; 8 instructions. 0 for minus infinity.
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// e^x for sums over numbers of half precision, in 2 instructions: off by at most 2 + 1.2 |x| units in the last place (the
// rounding of the scaled argument, as in __expf), and 0 where the result is subnormal.
__device__ inline float quick_exponential(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
}

// The larger of two, and the other one when one is NaN.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// A product the compiler must not fuse with what follows: the same logit has the same digits wherever it is computed.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

// Queues `kernel` on a stream of the current device. What is wrong with the launch is an error here; what goes wrong on the
// device comes up where the host next waits for it.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, unsigned threads, std::uintptr_t stream,
            const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA said at the launch: " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) + ")");
  }
}

}  // namespace
}  // namespace megarpt
