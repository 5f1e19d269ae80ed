// `stablekern._native`: what the library was built for, and C++ internals that the tests call.
// The ops themselves register with the dispatcher when the library is loaded; nothing of them is bound here.
#include <pybind11/pybind11.h>

#include "stablekern/lapack.h"
#include "stablekern/simd.h"

PYBIND11_MODULE(_native, m) {
  m.attr("simd") = stablekern::kSimdName;
  m.attr("vector_bytes") = stablekern::kVectorBytes;
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") = "2.10";
  m.attr("lapack") = stablekern::lapack_found();  // whether torch brings what "stablekern/lapack.h" calls
}
