// Stands in for csrc/common/cuda.hpp, so that the very kernels and their launch code are compiled by a C++ compiler and run
// without a GPU. The threads of a block are contexts of one thread of the process: each runs until it waits for others, in the
// order that CUDA_ON_CPU_ORDER says (ascending, descending, shuffled); a barrier that is missing shows in one order or another.
// A barrier that not all reach is an error. Shared memory keeps what the block before left in it, as on a GPU.
//
// Not played: what depends on time (two threads at one address between barriers show only by the order) and CUDA's own
// conversions and exponentials, for which common/numbers.hpp and std::exp2 stand in.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/numbers.hpp"
#include "common/tensor.hpp"

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 128 * 1024;

enum class State { kRuns, kAtWarp, kAtBlock, kDone };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  State state;
  unsigned exchanges;  // of shuffles; odd and even ones use different slots, so that nobody overtakes a reader
  alignas(16) unsigned char slots[2][16];
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned current;  // thread of the block
inline void (*run_kernel)(void*);
inline void* kernel;
inline std::mt19937 shuffles(1);

[[noreturn]] inline void stop(const std::string& what) { throw std::logic_error("cuda_on_cpu: " + what); }

inline void start() {
  run_kernel(kernel);
  threads[current].state = State::kDone;
}

inline void wait_as(State state) {
  Thread& thread = threads[current];
  thread.state = state;
  swapcontext(&thread.context, &scheduler);
}

inline std::vector<unsigned> order(unsigned size) {
  const char* name = std::getenv("CUDA_ON_CPU_ORDER");
  const std::string chosen = name == nullptr ? "ascending" : name;
  std::vector<unsigned> result(size);
  std::iota(result.begin(), result.end(), 0u);
  if (chosen == "descending") std::reverse(result.begin(), result.end());
  if (chosen == "shuffled") std::shuffle(result.begin(), result.end(), shuffles);
  return result;
}

// Lets the threads `first` to `last` go on if all of them wait as `state` says.
inline bool release(unsigned first, unsigned last, State state) {
  for (unsigned t = first; t < last; ++t) {
    if (threads[t].state != state) return false;
  }
  for (unsigned t = first; t < last; ++t) threads[t].state = State::kRuns;
  return true;
}

inline void run_block(unsigned size) {
  for (unsigned t = 0; t < size; ++t) {
    Thread& thread = threads[t];
    thread.state = State::kRuns;
    thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, &start, 0);
  }
  while (true) {
    for (const unsigned t : order(size)) {
      if (threads[t].state != State::kRuns) continue;
      current = t;
      swapcontext(&scheduler, &threads[t].context);
    }
    bool all_done = true, released = false;
    for (unsigned t = 0; t < size; ++t) all_done = all_done && threads[t].state == State::kDone;
    if (all_done) return;
    for (unsigned t = 0; t < size; t += kWarp) released = release(t, t + kWarp, State::kAtWarp) || released;
    if (!released && !release(0, size, State::kAtBlock)) stop("not all threads come to the same barrier");
  }
}

// threadIdx and blockIdx are read where the code of a thread runs, so they follow it.
struct ThreadIndex {
  struct X {
    operator unsigned() const { return current; }
  } x;
};

}  // namespace cuda_on_cpu

inline dim3 blockIdx;
inline cuda_on_cpu::ThreadIndex threadIdx;

inline void __syncthreads() { cuda_on_cpu::wait_as(cuda_on_cpu::State::kAtBlock); }
inline void __syncwarp() { cuda_on_cpu::wait_as(cuda_on_cpu::State::kAtWarp); }

template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int distance) {
  using namespace cuda_on_cpu;
  static_assert(sizeof(V) <= 16);
  if (mask != 0xffffffffu) stop("only whole warps shuffle here");
  const unsigned slot = threads[current].exchanges++ % 2, partner = current ^ static_cast<unsigned>(distance);
  std::memcpy(threads[current].slots[slot], &value, sizeof(V));
  wait_as(State::kAtWarp);
  if (threads[partner].exchanges != threads[current].exchanges) {
    // the partner may have gone on to its next exchange, but not further
    if (threads[partner].exchanges != threads[current].exchanges + 1) stop("a warp's lanes shuffle at different places");
  }
  std::memcpy(&value, threads[partner].slots[slot], sizeof(V));
  return value;
}

// Threads take turns, so that nothing comes between.
template <typename V>
V atomicAdd(V* address, V value) {
  const V before = *address;
  *address += value;
  return before;
}

namespace megarpt {
namespace {

inline float quick_exponential(float x) {
  const float result = std::exp2(x * 1.44269504f);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;
}
inline float larger(float a, float b) { return std::fmax(a, b); }
inline double larger(double a, double b) { return std::fmax(a, b); }
inline float product(float a, float b) { return a * b; }
inline double product(double a, double b) { return a * b; }

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, unsigned threads, std::uintptr_t,
            const Arguments&... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.x > 2147483647u || blocks.y > 65535u || threads > 1024 || threads % 32 != 0) {
    throw std::runtime_error(std::string(op) + ": CUDA would refuse this launch");
  }
  auto call = [&] { kernel(arguments...); };
  cuda_on_cpu::kernel = &call;
  cuda_on_cpu::run_kernel = [](void* target) { (*static_cast<decltype(call)*>(target))(); };
  if (cuda_on_cpu::threads.size() < threads) cuda_on_cpu::threads = std::vector<cuda_on_cpu::Thread>(threads);
  for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) cuda_on_cpu::run_block(threads);
  }
}

}  // namespace
}  // namespace megarpt
