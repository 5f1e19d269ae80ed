// csrc/cuda/eigh.cu on the CPU, for one size and type. `order`: in which the lanes of a warp take turns.
#define SK_EIGH_FWD 1
#define SK_EIGVALSH_FWD 1
#define SK_EIGH_BWD 1
#include "cuda.h"
namespace stablekern {
using namespace device;
}
// The kernel's file, with the names above.
#include "eigh.cu"

using stablekern::Element;
using stablekern::Real;

#pragma GCC visibility push(default)  // nothing else may be shared with the library of another size
extern "C" {

void emulate_eigh_fwd(int order, long long blocks, int threads, const Element* matrices, long long batch, int upper,
                      Real* values, Element* vectors, int* info) {
  auto kernel = [=] { eigh_fwd(matrices, batch, upper, values, vectors, info); };
  emulation::launch(order, blocks, threads, kernel);
}

void emulate_eigvalsh_fwd(int order, long long blocks, int threads, const Element* matrices, long long batch,
                          int upper, Real* values, int* info) {
  auto kernel = [=] { eigvalsh_fwd(matrices, batch, upper, values, info); };
  emulation::launch(order, blocks, threads, kernel);
}

void emulate_eigh_bwd(int order, long long blocks, int threads, const Real* values, const Element* vectors,
                      const Real* grad_values, const Element* grad_vectors, long long batch, int mode,
                      double gap_floor, double noise_kappa, Element* result) {
  auto kernel = [=] {
    eigh_bwd(values, vectors, grad_values, grad_vectors, batch, mode, gap_floor, noise_kappa, result);
  };
  emulation::launch(order, blocks, threads, kernel);
}
}
#pragma GCC visibility pop
