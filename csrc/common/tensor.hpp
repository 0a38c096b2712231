// What Python passes: addresses with shapes. No torch header is included anywhere in csrc/: the extension is built once and
// works with every torch, compiles in seconds, and can be compiled for CUDA where torch's CUDA headers are not installed.
// megarpt/ops/_ext.py makes these from tensors and is the only caller.
#pragma once

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace megarpt {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kInt64 = 4, kBool = 5, kInt32 = 6 };

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64", "int64", "bool", "int32"};
  return kNames[static_cast<int>(dtype)];
}

// Where the data is: the CPU, or a CUDA device with the stream that work is to be queued on.
struct Place {
  bool is_cuda = false;
  std::uintptr_t stream = 0;
};

// [rows, cols], a row's entries next to each other, rows `stride` entries apart.
struct Matrix {
  std::uintptr_t data;
  int64_t rows, cols, stride;
  DType dtype;

  template <typename T>
  T* row(int64_t index) const {
    return reinterpret_cast<T*>(data) + index * stride;
  }
};

// [size], entries next to each other. data == 0: not given.
struct Vector {
  std::uintptr_t data = 0;
  int64_t size = 0;
  DType dtype = DType::kFloat32;

  explicit operator bool() const { return data != 0; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

// Entries of the last dim next to each other, those of the others `strides` entries apart.
template <int kDims>
struct Strided {
  std::uintptr_t data;
  std::array<int64_t, kDims> sizes, strides;
  DType dtype;

  // Of the entry whose leading indices are given and whose others are 0.
  template <typename T, typename... Indices>
  T* at(Indices... indices) const {
    int64_t offset = 0;
    int dim = 0;
    ((offset += indices * strides[dim++]), ...);
    return reinterpret_cast<T*>(data) + offset;
  }
};

// Throws what Python sees as ValueError.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// As in "[2, 3]".
template <std::size_t kDims>
std::string text_of(const std::array<int64_t, kDims>& sizes) {
  std::ostringstream text;
  for (std::size_t dim = 0; dim < kDims; ++dim) text << (dim == 0 ? "[" : ", ") << sizes[dim];
  return text.str() + "]";
}

inline bool is_floating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16 || dtype == DType::kFloat64;
}

inline void check_floating(const char* op, const char* name, DType dtype) {
  if (!is_floating(dtype)) {
    fail(op, name, ": got ", name_of(dtype), ", expected float32, bfloat16, float16 or float64");
  }
}

inline void check_vector(const char* op, const char* name, const Vector& vector, int64_t size, DType dtype) {
  if (!vector || vector.size != size || vector.dtype != dtype) {
    fail(op, name, ": got ", vector ? name_of(vector.dtype) : "nothing", " [", vector.size, "], expected ", name_of(dtype),
         " [", size, "]");
  }
}

inline void check_optional(const char* op, const char* name, const Vector& vector, int64_t size, DType dtype) {
  if (vector) check_vector(op, name, vector, size, dtype);
}

}  // namespace megarpt
