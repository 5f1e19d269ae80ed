// `stablekern._native`: what the library was built for, and C++ internals that the tests call.
// The ops themselves register with the dispatcher when the library is loaded; nothing of them is bound here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "stablekern/exchange.h"
#include "stablekern/lapack.h"
#include "stablekern/philox.h"
#include "stablekern/simd.h"
#include "stablekern/split_product.h"

namespace {

// A new reference; null stands for a Python error that has been set.
pybind11::object given(PyObject* found) {
  if (found == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(found);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("simd") = stablekern::kSimdName;
  m.attr("vector_bytes") = stablekern::kVectorBytes;
  m.def("uses_matrix_unit", &stablekern::uses_matrix_unit);  // for a matrix of this size
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") = "2.10";
  const pybind11::object tensor = pybind11::module_::import("torch").attr("Tensor");  // torch keeps the type
  const pybind11::object parameter = pybind11::module_::import("torch.nn").attr("Parameter");
  const pybind11::object is_conj = tensor.attr("is_conj"), is_neg = tensor.attr("is_neg");
  const stablekern::Exchange exchange{tensor.ptr(), parameter.ptr(), is_conj.ptr(), is_neg.ptr(),
                                      stablekern::exchange_of(tensor.ptr())};
  // The gradients of a list of parameters, with one row for each in the int64 table at an address; None: not all plain.
  m.def("gather_gradients", [exchange](pybind11::list parameters, uintptr_t table) {
    return given(stablekern::gather_gradients(parameters.ptr(), reinterpret_cast<int64_t*>(table), exchange));
  });
  // Whether a list of tensors, or the gradients of a list of parameters, are finite throughout; None: not all plain.
  m.def("all_finite", [exchange](pybind11::list tensors) {
    return given(stablekern::all_finite(tensors.ptr(), exchange));
  });
  m.def("gradients_finite", [exchange](pybind11::list parameters, uintptr_t seen, bool unless_seen) {
    auto* known = reinterpret_cast<int64_t*>(seen);
    return given(stablekern::gradients_finite(parameters.ptr(), known, unless_seen, exchange));
  });
  // The parameters of a list that have a gradient, with the rows of the optimizer's table; None: not all plain.
  m.def("gather_adamw", [exchange](pybind11::list parameters, pybind11::dict state, int64_t first, bool coupled,
                                   bool amsgrad, uintptr_t table) {
    auto* rows = reinterpret_cast<stablekern::AdamwRow*>(table);
    return given(stablekern::gather_adamw(parameters.ptr(), state.ptr(), first, coupled, amsgrad, rows, exchange));
  });
  // Memory for results (stablekern/pool.h): a DLPack capsule; the bytes that wait in the pool and that tensors hold.
  m.def("pooled_empty", [](std::vector<int64_t> shape, uint8_t code, uint8_t bits, size_t limit) {
    return given(stablekern::pooled_capsule(std::move(shape), code, bits, limit));
  });
  m.def("pool_bytes", [] { return std::pair(stablekern::pool().held(), stablekern::pool().lent()); });
  m.def("pool_clear", [] { stablekern::pool().clear(); });
  m.def("philox4x32", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    constexpr int lanes = stablekern::kWordLanes / 2;
    stablekern::WideWords word[1][4];
    stablekern::philox4x32<1>({stablekern::WideWords{} + c0}, c1, {c2, c3, k0, k1}, word);
    pybind11::tuple answer(4);
    for (int k = 0; k < 4; ++k) answer[k] = static_cast<uint32_t>(word[0][k][k % lanes]);  // all alike
    return answer;
  });
  m.attr("lapack") = stablekern::lapack_found();  // whether torch brings what "stablekern/lapack.h" calls
}
