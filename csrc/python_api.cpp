// The module megarpt._C: one register function for each folder of csrc/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cached_attention/api.hpp"
#include "common/instruction_set.hpp"
#include "common/tensor.hpp"
#include "linear_logprob/api.hpp"
#include "token_select/api.hpp"

namespace py = pybind11;

namespace megarpt {

template <int kDims>
void register_strided(py::module_& m, const char* name) {
  using Sizes = std::array<int64_t, kDims>;
  const auto make = [](std::uintptr_t data, const Sizes& sizes, const Sizes& strides, DType dtype) {
    return Strided<kDims>{data, sizes, strides, dtype};
  };
  py::class_<Strided<kDims>>(m, name).def(py::init(make));
}

void register_common(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64)
      .value("int64", DType::kInt64)
      .value("bool", DType::kBool)
      .value("int32", DType::kInt32);
  py::class_<Place>(m, "Place").def(py::init<bool, std::uintptr_t>());
  py::class_<Matrix>(m, "Matrix").def(py::init<std::uintptr_t, int64_t, int64_t, int64_t, DType>());
  py::class_<Vector>(m, "Vector").def(py::init<>()).def(py::init<std::uintptr_t, int64_t, DType>());
  register_strided<4>(m, "Strided4");
  register_strided<5>(m, "Strided5");
}

void register_cached_attention(py::module_& m) {
  using namespace cached_attention;
  py::class_<Cache>(m, "Cache").def(py::init<Strided<5>, Vector, Strided<5>, Vector, Vector>());
  m.def("attend_step", &attend_step, py::call_guard<py::gil_scoped_release>());
}

void register_linear_logprob(py::module_& m) {
  using namespace linear_logprob;
  py::class_<RowState>(m, "RowState").def(py::init<Vector, Vector, Vector, Vector, Vector>());
  py::class_<RowGradient>(m, "RowGradient").def(py::init<Vector, Vector, Vector, Vector, Vector, Vector, Vector, Vector>());
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("add_tile", &add_tile, unlocked);
  m.def("write_gradient", &write_gradient, unlocked);
  m.def("add_transposed", &add_transposed, unlocked);
}

void register_token_select(py::module_& m) {
  using namespace token_select;
  py::class_<Scores>(m, "Scores").def(py::init<Vector, Vector>());
  py::class_<Search>(m, "Search").def(py::init<Vector, Vector, Vector>());
  py::class_<Report>(m, "Report").def(py::init<>()).def(py::init<Vector, bool, Vector, Vector, Matrix, Vector>());
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("score_excess", &score_excess, unlocked);
  m.def("count_digits", &count_digits, unlocked);
  m.def("count_order_digits", &count_order_digits, unlocked);
  m.def("choose_digit", &choose_digit, unlocked);
  m.def("count_equals", &count_equals, unlocked);
  m.def("write_mask", &write_mask, unlocked);
  m.def("add_up", &add_up, unlocked);
}

}  // namespace megarpt

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of megarpt; called through megarpt.ops alone.";
#ifdef MEGARPT_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("instruction_set") = megarpt::instruction_set();
  megarpt::register_common(m);
  auto cached_attention = m.def_submodule("cached_attention");
  megarpt::register_cached_attention(cached_attention);
  auto linear_logprob = m.def_submodule("linear_logprob");
  megarpt::register_linear_logprob(linear_logprob);
  auto token_select = m.def_submodule("token_select");
  megarpt::register_token_select(token_select);
}
