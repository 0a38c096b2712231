// csrc/token_select with C linkage, for ctypes: everything runs on what stands in for a GPU. Each function returns what went
// wrong, or null.
#include <exception>
#include <string>

#include "token_select/api.hpp"

namespace {

using megarpt::Place;
using megarpt::Vector;
using namespace megarpt::token_select;

const Place kGpu{true, 0};

template <typename Body>
const char* caught(const Body& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

const char* score_excess(const Vector* logprob, const Vector* reference, const Scores* scores, const Vector* histogram) {
  return caught([&] { score_excess(*logprob, *reference, *scores, *histogram, kGpu); });
}

const char* count_digits(const Scores* scores, const Vector* search, int shift, int width, const Vector* histogram) {
  return caught([&] { count_digits(*scores, *search, shift, width, *histogram, kGpu); });
}

const char* count_order_digits(const Scores* scores, const Search* search, int shift, int width, const Vector* histogram) {
  return caught([&] { count_order_digits(*scores, *search, shift, width, *histogram, kGpu); });
}

const char* choose_digit(const Vector* histogram, const Vector* search, int width, const Vector* result) {
  return caught([&] { choose_digit(*histogram, *search, width, *result, kGpu); });
}

const char* count_equals(const Scores* scores, const Search* search, const Vector* counts) {
  return caught([&] { count_equals(*scores, *search, *counts, kGpu); });
}

const char* write_mask(const Scores* scores, const Search* search, const Vector* starts, const Vector* mask,
                       const Report* report) {
  return caught([&] { write_mask(*scores, *search, *starts, *mask, *report, kGpu); });
}

const char* add_up(const Scores* scores, const Vector* mask, const Report* report) {
  return caught([&] { add_up(*scores, *mask, *report, kGpu); });
}

}  // extern "C"
