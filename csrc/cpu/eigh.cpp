// Batched eigendecomposition of small symmetric matrices (n <= 32), and its backward.
//
// Each matrix is scaled by a power of two to size 1 (non-finite ones are replaced by zero and reported) and solved in a
// SIMD lane of its own, as "stablekern/eigh_lanes.h" tells.
#include "stablekern/eigh_lanes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

namespace stablekern {
namespace {

using torch::stable::Tensor;

// One triangle of up to kLanes matrices, scaled to size 1, to the lower triangle of z.
template <class T, int N, int Blocks>
void load_block(Workspace<T, N, Blocks>& w, int block, const T* matrices, int runtime_n, int count, bool upper) {
  const int n = N > 0 ? N : runtime_n;
  constexpr int stride = Workspace<T, N, Blocks>::kStride;
  Vec<T>* full = w.staging;
  gather_items(matrices, n * n, n * n, count, full);
  const Vec<T> zero{};
  Vec<T> largest{}, probe{};  // probe: NaN once an entry is not finite
  const int row = upper ? 1 : n, column = upper ? n : 1;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < i; ++j) {
      largest = max(abs(full[i * row + j * column]), largest);
      probe = fma(full[i * n + j], zero, probe);
      probe = fma(full[j * n + i], zero, probe);
    }
    largest = max(abs(full[i * n + i]), largest);
    probe = fma(full[i * n + i], zero, probe);
  }
  const Mask<T> finite = equal(probe, zero);
  const PowerOfTwo<T> power = power_of_two<T>(largest);
  w.non_finite[block] = !finite;
  w.up[block] = power.up;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j <= i; ++j)
      w.z[block][i * stride + j] = select(finite, full[i * row + j * column] * power.down, zero);
}

template <class T, int N, int Blocks, bool Vectors>
void store_block(Workspace<T, N, Blocks>& w, int block, int n, int count, bool past_caches, T* eigenvalues,
                 T* eigenvectors, int32_t* info) {
  alignas(64) typename VecTypes<T>::integer rank[Workspace<T, N, Blocks>::kN][kLanes<T>];
  const Vec<T>(*values)[Blocks] = Vectors ? w.d : w.values;
  const Vec<T> poison = store_values<T, N, Blocks>(w, values, block, n, count, rank, eigenvalues, info);
  if constexpr (Vectors) {
    T* matrices = reinterpret_cast<T*>(w.staging);
    const auto place = [=](int lane, int row) { return matrices + (lane * n + row) * n; };
    store_vectors<T, N, Blocks>(w, block, n, rank, poison, place);
    copy_out(matrices, static_cast<int64_t>(count) * n * n, past_caches, eigenvectors);
  }
}

template <class T, int N, bool Vectors>
void solve_matrices(const T* matrices, int64_t batch, int n, bool upper, T* eigenvalues, T* eigenvectors,
                    int32_t* info) {
  const int64_t size = static_cast<int64_t>(n) * n;
  const bool past_caches = batch * size * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const auto load_lanes = [&](auto& w, int block, int64_t item, int count) {
    load_block(w, block, matrices + item * size, n, count, upper);
    // The next block comes from memory while this one is reduced.
    prefetch_items(matrices + (item + count) * size, std::min<int64_t>(batch - item - count, kLanes<T>) * size);
  };
  const auto store_lanes = [&]<int Blocks>(Workspace<T, N, Blocks>& w, int block, int64_t item, int count) {
    T* vectors = Vectors ? eigenvectors + item * size : nullptr;
    store_block<T, N, Blocks, Vectors>(w, block, n, count, past_caches, eigenvalues + item * n, vectors, info + item);
  };
  solve_lanes<T, N, Vectors>(batch, n, load_lanes, store_lanes);
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T, int N>
struct alignas(64) BackwardWorkspace {
  static constexpr int kN = N > 0 ? N : kMaxN;
  Vec<T> vectors[kN * kN], gradient[kN * kN], middle[kN * kN];
  Vec<T> values[kN], value_gradient[kN];
};

template <class T, int N>
void backward(const T* eigenvalues, const T* eigenvectors, const T* grad_values, const T* grad_vectors, int64_t batch,
              int runtime_n, const GapRule& rule, T* grad_matrices) {
  constexpr int lanes = kLanes<T>;
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    const int n = N > 0 ? N : runtime_n;
    auto& w = workspace<BackwardWorkspace<T, N>>();
    for (int64_t item = begin * lanes; item < batch && item < end * lanes; item += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(batch - item, lanes));
      const int64_t at = item * n * n;
      gather_items(eigenvectors + at, n * n, n * n, count, w.vectors);
      if (grad_values) gather_items(grad_values + item * n, n, n, count, w.value_gradient);
      const Vec<T>* v = w.vectors;  // v[j * n + a] = component a of eigenvector j
      if (grad_vectors) {
        gather_items(eigenvalues + item * n, n, n, count, w.values);
        gather_items(grad_vectors + at, n * n, n * n, count, w.gradient);
        product<T, false>(n, n, n, v, n, 1, w.gradient, n, 1, w.middle, n);  // M = V^T gV
        weigh_pairs<T>(n, rule, w.values, grad_values ? w.value_gradient : nullptr, w.middle);
        product<T, false>(n, n, n, w.middle, n, 1, v, 1, n, w.gradient, n);  // S V^T
      } else {
        for (int j = 0; j < n; ++j)
          for (int a = 0; a < n; ++a) w.gradient[j * n + a] = w.value_gradient[j] * v[j * n + a];
      }
      product<T, true>(n, n, n, w.gradient, 1, n, v, 1, n, w.middle, n);  // V (S V^T)
      scatter_items(w.middle, n * n, count, grad_matrices + at);
    }
  });
}

// ---- launchers ----------------------------------------------------------------------------------------------------

template <bool Vectors>
void solve_tensor(const Tensor& A, bool upper, const Tensor& eigenvalues, const Tensor* eigenvectors,
                  const Tensor& info) {
  const int64_t batch = A.size(0);
  const int n = static_cast<int>(A.size(1));
  if (batch == 0 || n == 0) return;
  STD_TORCH_CHECK(n <= kMaxN, "eigh: n must be at most ", kMaxN);
  const auto run = [&]<class T>(T) {
    T* vectors = eigenvectors ? static_cast<T*>(eigenvectors->mutable_data_ptr()) : nullptr;
    const auto* from = static_cast<const T*>(A.const_data_ptr());
    auto* values = static_cast<T*>(eigenvalues.mutable_data_ptr());
    auto* flags = static_cast<int32_t*>(info.mutable_data_ptr());
    if (n == kElectrodes)
      solve_matrices<T, kElectrodes, Vectors>(from, batch, n, upper, values, vectors, flags);
    else
      solve_matrices<T, 0, Vectors>(from, batch, n, upper, values, vectors, flags);
  };
  A.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

void eigh_fwd(const Tensor A, bool upper, Tensor eigenvalues, Tensor eigenvectors, Tensor info) {
  solve_tensor<true>(A, upper, eigenvalues, &eigenvectors, info);
}

void eigvalsh_fwd(const Tensor A, bool upper, Tensor eigenvalues, Tensor info) {
  solve_tensor<false>(A, upper, eigenvalues, nullptr, info);
}

void eigh_bwd(const Tensor eigenvalues, const Tensor eigenvectors, std::optional<Tensor> grad_eigenvalues,
              std::optional<Tensor> grad_eigenvectors, int64_t mode, double gap_floor, double noise_kappa,
              Tensor grad_A) {
  const int64_t batch = eigenvalues.size(0);
  const int n = static_cast<int>(eigenvalues.size(1));
  if (batch == 0 || n == 0) return;
  STD_TORCH_CHECK(n <= kMaxN, "eigh_bwd: n must be at most ", kMaxN);
  STD_TORCH_CHECK(mode >= kAuto && mode <= kRaw, "eigh_bwd: unknown mode ", mode);
  const GapRule rule{mode, gap_floor, noise_kappa};
  const auto run = [&]<class T>(T) {
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    auto* out = static_cast<T*>(grad_A.mutable_data_ptr());
    const T *values = data(eigenvalues), *vectors = data(eigenvectors);
    const T *grad_values = data(grad_eigenvalues), *grad_vectors = data(grad_eigenvectors);
    if (!grad_values && !grad_vectors)
      std::memset(out, 0, static_cast<std::size_t>(batch * n * n) * sizeof(T));
    else if (n == kElectrodes)
      backward<T, kElectrodes>(values, vectors, grad_values, grad_vectors, batch, n, rule, out);
    else
      backward<T, 0>(values, vectors, grad_values, grad_vectors, batch, n, rule, out);
  };
  eigenvalues.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("eigh_fwd(Tensor A, bool upper, Tensor(a!) eigenvalues, Tensor(b!) eigenvectors, Tensor(c!) info) -> ()");
  m.def("eigvalsh_fwd(Tensor A, bool upper, Tensor(a!) eigenvalues, Tensor(b!) info) -> ()");
  m.def(
      "eigh_bwd(Tensor eigenvalues, Tensor eigenvectors_rows, Tensor? grad_eigenvalues, "
      "Tensor? grad_eigenvectors_rows, int mode, float gap_floor, float noise_kappa, "
      "Tensor(a!) grad_A) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("eigh_fwd", TORCH_BOX(&stablekern::eigh_fwd));
  m.impl("eigvalsh_fwd", TORCH_BOX(&stablekern::eigvalsh_fwd));
  m.impl("eigh_bwd", TORCH_BOX(&stablekern::eigh_bwd));
}
