// csrc/cuda/eigh.cu on the CPU, for one size and type.
#define SK_EIGH_FWD 1
#define SK_EIGVALSH_FWD 1
#define SK_EIGH_BWD 1
#include "cuda.h"
// The kernel's file, with the names above.
#include "eigh.cu"

namespace {

using stablekern::Element;
using stablekern::Real;

template <class Kernel>
void launch(int order, long long batch, Kernel kernel) {
  constexpr long long items = stablekern::kWarps * stablekern::kGroups;
  emulation::launch((batch + items - 1) / items, stablekern::kWarps * 32, order, kernel);
}

}  // namespace

#pragma GCC visibility push(default)  // nothing else may be shared with the library of another size
extern "C" {

void emulate_eigh_fwd(int order, const Element* matrices, long long batch, int upper, Real* values, Element* vectors,
                      int* info) {
  launch(order, batch, [=] { eigh_fwd(matrices, batch, upper, values, vectors, info); });
}

void emulate_eigvalsh_fwd(int order, const Element* matrices, long long batch, int upper, Real* values, int* info) {
  launch(order, batch, [=] { eigvalsh_fwd(matrices, batch, upper, values, info); });
}

void emulate_eigh_bwd(int order, const Real* values, const Element* vectors, const Real* grad_values,
                      const Element* grad_vectors, long long batch, int mode, double gap_floor, double noise_kappa,
                      double noise_floor, Element* result) {
  launch(order, batch, [=] {
    eigh_bwd(values, vectors, grad_values, grad_vectors, batch, mode, gap_floor, noise_kappa, noise_floor, result);
  });
}
}
#pragma GCC visibility pop
