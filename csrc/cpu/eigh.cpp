// Batched eigendecomposition of Hermitian matrices, and its backward.
//
// Up to n = 32 they are solved here, larger ones by LAPACK ("stablekern/eigh_large.h"), without vectors by the reduction
// of "stablekern/tridiagonal.h". Each small matrix is scaled by a power of two to size 1 (non-finite ones are replaced by
// zero and reported) and solved in a SIMD lane of its own, as "stablekern/eigh_lanes.h" tells.
#include "stablekern/eigh_lanes.h"
#include "stablekern/eigh_large.h"
#include "stablekern/symmetric_lanes.h"
#include "stablekern/tridiagonal.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

namespace stablekern {

template struct Solver<float, kBlocks, true>;
template struct Solver<float, 1, true>;
template struct Solver<double, kBlocks, true>;
template struct Solver<double, 1, true>;

namespace {

using torch::stable::Tensor;

template <class S, int Blocks, bool Vectors, class T = RealOf<S>>
void store_block(Workspace<S, Blocks>& w, int block, int n, int count, bool past_caches, T* eigenvalues,
                 T* eigenvectors, int32_t* info) {
  alignas(64) typename VecTypes<T>::integer rank[Workspace<S, Blocks>::kN][kLanes<T>];
  const Vec<T>(*values)[Blocks] = Vectors ? w.d : w.values;
  const Vec<T> poison = store_values<S, Blocks>(w, values, block, n, count, rank, eigenvalues, info);
  if constexpr (Vectors) {
    T* matrices = reinterpret_cast<T*>(w.staging);
    const int length = kParts<S> * n;
    const auto place = [=](int lane, int row) { return matrices + (lane * n + row) * length; };
    store_vectors<S, Blocks>(w, block, n, rank, poison, place);
    copy_out(matrices, static_cast<int64_t>(count) * n * length, past_caches, eigenvectors);
  }
}

template <class S, bool Vectors, class T = RealOf<S>>
void solve_matrices(const T* matrices, int64_t batch, int n, bool upper, int sweeps, T* eigenvalues, T* eigenvectors,
                    int32_t* info) {
  const int64_t size = static_cast<int64_t>(kParts<S>) * n * n;
  const bool past_caches = batch * size * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const auto load_lanes = [&](auto& w, int block, int64_t item, int count) {
    load_triangles(w, block, matrices + item * size, n, count, upper);
    w.upcoming.aim(matrices + (item + count) * size, std::min<int64_t>(batch - item - count, kLanes<T>) * size);
  };
  const auto store_lanes = [&]<int Blocks>(Workspace<S, Blocks>& w, int block, int64_t item, int count) {
    T* vectors = Vectors ? eigenvectors + item * size : nullptr;
    store_block<S, Blocks, Vectors>(w, block, n, count, past_caches, eigenvalues + item * n, vectors, info + item);
  };
  solve_lanes<S, Vectors>(batch, n, load_lanes, store_lanes, sweeps);
}

// Larger ones: the reduction to a tridiagonal matrix, one matrix per thread, then QL in double precision.
template <class S, class T = RealOf<S>>
void values_large(const S* matrices, int64_t batch, int n, bool upper, T* values, int32_t* info) {
  const int64_t size = static_cast<int64_t>(n) * n;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    Reduction<S> reduction(n);
    Tridiagonal64 tridiagonal(n);
    const Buffer<S> turned(upper ? size : 0);
    const Buffer<double> found(n);
    for (int64_t item = begin; item < end; ++item) {
      const S* matrix = matrices + item * size;
      T* to = values + item * n;
      info[item] = all_finite(matrix, size) ? 0 : kNonFinite;
      if (info[item] == 0) {
        if (upper) {  // the transpose, which has the same eigenvalues
          for (int i = 0; i < n; ++i)
            for (int j = 0; j <= i; ++j) turned[int64_t{i} * n + j] = matrix[int64_t{j} * n + i];
          matrix = turned;
        }
        const T up = reduction.reduce(matrix);
        tridiagonal.set(reduction.diagonal, reduction.couplings);
        if (!tridiagonal.all_values(found)) info[item] = kNotConverged;
        for (int i = 0; i < n; ++i) to[i] = static_cast<T>(found[i]) * up;
      }
      if (info[item] != 0) fill_nan(to, n);
    }
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class S>
struct alignas(64) BackwardWorkspace {
  static constexpr int kN = kMaxN;
  Element<S> vectors[kN * kN], gradient[kN * kN], middle[kN * kN];
  Vec<RealOf<S>> values[kN], value_gradient[kN];
};

template <class S, class T = RealOf<S>>
void backward(const T* eigenvalues, const T* eigenvectors, const T* grad_values, const T* grad_vectors, int64_t batch,
              int n, const GapRule& rule, T* grad_matrices) {
  constexpr int lanes = kLanes<T>;
  const bool past_caches = batch * n * n * static_cast<int64_t>(sizeof(S)) > kStreamBytes;
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    const int size = kParts<S> * n * n;
    auto& w = workspace<BackwardWorkspace<S>>();
    for (int64_t item = begin * lanes; item < batch && item < end * lanes; item += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(batch - item, lanes));
      const int64_t next = (item + count) * size, next_length = std::min<int64_t>(batch - item - count, lanes) * size;
      Prefetcher next_vectors, next_gradient;
      next_vectors.aim(eigenvectors + next, next_length);
      if (grad_vectors) next_gradient.aim(grad_vectors + next, next_length);
      gather_elements(eigenvectors + item * size, n * n, count, w.vectors);
      if (grad_values) gather_elements(grad_values + item * n, n, count, w.value_gradient);
      const Element<S>* v = w.vectors;  // v[j * n + a] = component a of eigenvector j
      if (grad_vectors) {
        gather_elements(eigenvalues + item * n, n, count, w.values);
        gather_elements(grad_vectors + item * size, n * n, count, w.gradient);
        if constexpr (kIsComplex<S>) fix_phase(n, v, w.gradient);
        // M = V^H gV, S from it, S V^H, V S V^H
        product<S, false, Conjugate::kFirst>(n, n, n, v, n, 1, w.gradient, n, 1, w.middle, n, next_vectors, n);
        weigh_pairs<S>(n, rule, w.values, grad_values ? w.value_gradient : nullptr, w.middle);
        product<S, false, Conjugate::kSecond>(n, n, n, w.middle, n, 1, v, 1, n, w.gradient, n, next_gradient, n);
      } else {
        for (int j = 0; j < n; ++j)
          for (int a = 0; a < n; ++a) w.gradient[j * n + a] = conj(v[j * n + a]) * w.value_gradient[j];
      }
      product<S, true>(n, n, n, v, 1, n, w.gradient, 1, n, w.middle, n);
      T* staging = reinterpret_cast<T*>(w.gradient);
      scatter_items(reinterpret_cast<const Vec<T>*>(w.middle), size, count, staging);
      copy_out(staging, static_cast<int64_t>(count) * size, past_caches, grad_matrices + item * size);
    }
    stream_fence();
  });
}

// ---- launchers ----------------------------------------------------------------------------------------------------

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <bool Vectors>
void solve_tensor(const Tensor& A, bool upper, int sweeps, const Tensor& eigenvalues, const Tensor* eigenvectors,
                  const Tensor& info) {
  const int64_t batch = A.size(0);
  const int n = static_cast<int>(A.size(1));
  if (batch == 0 || n == 0) return;
  dispatch(A, [&]<class S>(S) {
    using T = RealOf<S>;
    T* vectors = eigenvectors ? static_cast<T*>(eigenvectors->mutable_data_ptr()) : nullptr;
    auto* values = static_cast<T*>(eigenvalues.mutable_data_ptr());
    auto* flags = static_cast<int32_t*>(info.mutable_data_ptr());
    if (n <= kMaxN) return solve_matrices<S, Vectors>(data<T>(A), batch, n, upper, sweeps, values, vectors, flags);
    if constexpr (Vectors)
      solve_large(data<S>(A), batch, n, upper, values, reinterpret_cast<S*>(vectors), flags);
    else if constexpr (std::is_same_v<T, float>)
      values_large(data<S>(A), batch, n, upper, values, flags);
    else
      STD_TORCH_CHECK(false, "eigvalsh: n must be at most ", kMaxN, " in double precision");
  });
}

void eigh_fwd(const Tensor A, bool upper, Tensor eigenvalues, Tensor eigenvectors, Tensor info, int64_t sweeps) {
  STD_TORCH_CHECK(sweeps >= 0 && sweeps <= kMaxSweeps, "eigh: sweeps must be 0 to ", kMaxSweeps);
  solve_tensor<true>(A, upper, static_cast<int>(sweeps), eigenvalues, &eigenvectors, info);
}

void eigvalsh_fwd(const Tensor A, bool upper, Tensor eigenvalues, Tensor info) {
  solve_tensor<false>(A, upper, kMaxSweeps, eigenvalues, nullptr, info);
}

void eigh_bwd(const Tensor eigenvalues, const Tensor eigenvectors, std::optional<Tensor> grad_eigenvalues,
              std::optional<Tensor> grad_eigenvectors, int64_t mode, double gap_floor, double noise_kappa,
              Tensor grad_A) {
  const int64_t batch = eigenvalues.size(0);
  const int n = static_cast<int>(eigenvalues.size(1));
  if (batch == 0 || n == 0) return;
  STD_TORCH_CHECK(mode >= kAuto && mode <= kRaw, "eigh_bwd: unknown mode ", mode);
  const GapRule rule{mode, gap_floor, noise_kappa};
  if (!grad_eigenvalues && !grad_eigenvectors) {
    if (grad_A.numel() > 0) std::memset(grad_A.mutable_data_ptr(), 0, static_cast<std::size_t>(grad_A.numel() * grad_A.element_size()));
    return;
  }
  dispatch(eigenvectors, [&]<class S>(S) {
    using T = RealOf<S>;
    if (n <= kMaxN)
      backward<S>(data<T>(eigenvalues), data<T>(eigenvectors), data<T>(grad_eigenvalues), data<T>(grad_eigenvectors),
                     batch, n, rule, static_cast<T*>(grad_A.mutable_data_ptr()));
    else
      backward_large(data<T>(eigenvalues), data<S>(eigenvectors), data<T>(grad_eigenvalues), data<S>(grad_eigenvectors),
                     batch, n, rule, static_cast<S*>(grad_A.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  // A smaller number of sweeps is for tests: few matrices, if any, need all.
  const std::string sweeps = std::to_string(stablekern::kMaxSweeps);
  m.def(("eigh_fwd(Tensor A, bool upper, Tensor(a!) eigenvalues, Tensor(b!) eigenvectors, Tensor(c!) info, "
         "int sweeps=" + sweeps + ") -> ()").c_str());
  m.def("eigvalsh_fwd(Tensor A, bool upper, Tensor(a!) eigenvalues, Tensor(b!) info) -> ()");
  m.def(
      "eigh_bwd(Tensor eigenvalues, Tensor eigenvector_rows, Tensor? grad_eigenvalues, "
      "Tensor? grad_eigenvector_rows, int mode, float gap_floor, float noise_kappa, "
      "Tensor(a!) grad_A) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("eigh_fwd", TORCH_BOX(&stablekern::eigh_fwd));
  m.impl("eigvalsh_fwd", TORCH_BOX(&stablekern::eigvalsh_fwd));
  m.impl("eigh_bwd", TORCH_BOX(&stablekern::eigh_bwd));
}
