// Laplacian positional encodings of small graphs (n <= 32): adjacency -> normalised Laplacian -> eigenvectors, with the
// natural basis of the null space, and the way back. One graph per SIMD lane; nothing in between is written to memory.
//
// The rows that the encoding consists of and the other eigenvectors, which only the backward needs, go to two places:
// `first` tells which rows are the former.
#include "stablekern/eigh_lanes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

namespace stablekern {
namespace {

using torch::stable::Tensor;

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
struct Encodings {
  T *values, *pe_rows, *other_rows, *inverse_root;
  int32_t *components, *info;
};

struct NullSpaceRule {
  bool canonical;
  double cluster_gap;  // relative to max|w|: eigenvalues up to it count as 0
};

// The Laplacians of up to kLanes graphs to the lower triangle of z; of those with a non-finite weight the identity.
template <class T, int Blocks>
void load_laplacians(Workspace<T, Blocks>& w, int block, const T* adjacency, int n, int count,
                     T* inverse_root) {
  using W = Workspace<T, Blocks>;
  constexpr int stride = W::kStride;
  const Vec<T> zero{}, one = zero + T(1), half = zero + T(0.5), tiny = zero + std::numeric_limits<T>::min();
  Vec<T>*full = w.staging, *z = w.z[block];
  gather_items(adjacency, n * n, n * n, count, full);
  Vec<T> largest{}, probe{};  // probe: NaN once a weight is not finite
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      const Vec<T> a = full[i * n + j], b = full[j * n + i], s = fma(a, half, b * half);
      probe = fma(a, zero, fma(b, zero, probe));
      largest = max(abs(s), largest);
      z[i * stride + j] = s;
    }
  }
  const Mask<T> finite = equal(probe, zero);
  const Vec<T> down = power_of_two<T>(largest).down;
  Vec<T> degree[W::kN], root[W::kN], result[W::kN];
  for (int i = 0; i < n; ++i) {
    degree[i] = zero;
    for (int j = 0; j <= i; ++j) {
      const Vec<T> s = select(finite, z[i * stride + j] * down, zero);
      z[i * stride + j] = s;
      degree[i] += abs(s);
      if (j < i) degree[j] += abs(s);
    }
  }
  const Vec<T> scale = select(finite, sqrt(down), splat(std::numeric_limits<T>::quiet_NaN()));
  for (int i = 0; i < n; ++i) {
    root[i] = select(less(degree[i], tiny), zero, one / sqrt(max(degree[i], tiny)));
    result[i] = root[i] * scale;
    for (int j = 0; j <= i; ++j) {
      Vec<T>& entry = z[i * stride + j];
      entry = fnma(entry, root[i] * root[j], i == j ? one : zero);
    }
  }
  w.up[block] = one;  // a Laplacian is of size 1 as it is
  w.non_finite[block] = !finite;
  scatter_items(result, n, count, inverse_root);
}

// Of one graph with eigenvalues `values`: if its weights are >= 0 and it has several components, clearly apart, the
// eigenvalues 0 and the vectors D^(1/2) 1_C, one for each of them, by lowest node; how many, or 0 if nothing was done.
template <class T, class Row>
int set_null_space(const T* adjacency, const T* inverse_root, int n, T limit, T* values, const Row& row) {
  uint32_t linked[kMaxN] = {};  // bit j of i: neighbours
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      const T s = adjacency[i * n + j] / 2 + adjacency[j * n + i] / 2;
      if (s < 0) return 0;
      if (s > 0 && inverse_root[i] > 0 && inverse_root[j] > 0) {
        linked[i] |= uint32_t{1} << j;
        linked[j] |= uint32_t{1} << i;
      }
    }
  }
  uint32_t members[kMaxN], seen = 0;
  int count = 0;
  for (int i = 0; i < n; ++i) {
    if (!(inverse_root[i] > 0) || (seen >> i & 1)) continue;
    uint32_t found = uint32_t{1} << i;
    for (uint32_t open = found; open != 0;) {
      const uint32_t fresh = linked[std::countr_zero(open)] & ~found;
      open = (open & (open - 1)) | fresh;
      found |= fresh;
    }
    seen |= found;
    members[count++] = found;
  }
  if (count < 2 || (count < n && !(values[count] > limit))) return 0;
  for (int c = 0; c < count; ++c) {
    T smallest = std::numeric_limits<T>::infinity(), sum = 0, *to = row(c);
    for (int i = 0; i < n; ++i)
      if (members[c] >> i & 1) smallest = std::min(inverse_root[i], smallest);
    for (int i = 0; i < n; ++i) {
      to[i] = members[c] >> i & 1 ? smallest / inverse_root[i] : T(0);  // in [0, 1]: the squares are in range
      sum += to[i] * to[i];
    }
    const T norm = std::sqrt(sum);
    for (int i = 0; i < n; ++i) to[i] /= norm;
    values[c] = 0;
  }
  return count;
}

template <class T, int Blocks>
void store_encodings(Workspace<T, Blocks>& w, int block, int n, int first, int k, const NullSpaceRule& rule,
                     const T* adjacency, int64_t item, int count, bool past_caches, const Encodings<T>& out) {
  constexpr int lanes = kLanes<T>, kN = Workspace<T, Blocks>::kN;
  alignas(64) typename VecTypes<T>::integer rank[kN][lanes];
  T* values = out.values + item * n;
  const Vec<T> poison = store_values<T, Blocks>(w, w.d, block, n, count, rank, values, out.info + item);

  T* pe = reinterpret_cast<T*>(w.staging);
  T* other = pe + lanes * k * n;
  T* start[kN];  // of the rows of lane 0
  int pitch[kN];
  for (int r = 0; r < n; ++r) {
    const bool chosen = r >= first && r < first + k;
    start[r] = chosen ? pe + (r - first) * n : other + (r < first ? r : r - k) * n;
    pitch[r] = (chosen ? k : n - k) * n;
  }
  const auto place = [&](int lane, int row) { return start[row] + lane * pitch[row]; };
  store_vectors<T, Blocks>(w, block, n, rank, poison, place);

  for (int lane = 0; lane < count; ++lane) {
    out.components[item + lane] = 0;
    if (!rule.canonical || n == 1) continue;
    T* own = values + lane * n;
    const T limit = static_cast<T>(rule.cluster_gap) * std::max(std::abs(own[0]), std::abs(own[n - 1]));
    if (!(own[1] <= limit)) continue;
    const auto row = [&](int r) { return place(lane, r); };
    const int64_t at = item + lane;
    out.components[at] = set_null_space(adjacency + at * n * n, out.inverse_root + at * n, n, limit, own, row);
  }
  copy_out(pe, static_cast<int64_t>(count) * k * n, past_caches, out.pe_rows + item * k * n);
  copy_out(other, static_cast<int64_t>(count) * (n - k) * n, past_caches, out.other_rows + item * (n - k) * n);
}

template <class T>
void encode(const T* adjacency, int64_t batch, int n, int first, int k, const NullSpaceRule& rule,
            const Encodings<T>& out) {
  const int64_t size = static_cast<int64_t>(n) * n;
  const bool past_caches = batch * size * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const auto load_lanes = [&](auto& w, int block, int64_t item, int count) {
    load_laplacians(w, block, adjacency + item * size, n, count, out.inverse_root + item * n);
    w.upcoming.aim(adjacency + (item + count) * size, std::min<int64_t>(batch - item - count, kLanes<T>) * size);
  };
  const auto store_lanes = [&](auto& w, int block, int64_t item, int count) {
    store_encodings(w, block, n, first, k, rule, adjacency, item, count, past_caches, out);
  };
  solve_lanes<T, true>(batch, n, load_lanes, store_lanes);
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct Cotangents {
  const T *values, *pe;  // either may be null
  bool columns;          // `pe` is (n, k) per item, else (k, n)
};

template <class T>
struct alignas(64) AdjointWorkspace {
  static constexpr int kN = kMaxN;
  Vec<T> vectors[kN * kN], gradient[kN * kN], middle[kN * kN];
  Vec<T> values[kN], value_gradient[kN], root[kN];
};

// The lanes for which some of `length` values is not 0.
template <class T>
Mask<T> any_nonzero(const Vec<T>* values, int length) {
  Mask<T> found = none_set<T>();
  for (int i = 0; i < length; ++i) found = found | !equal(values[i], Vec<T>{});
  return found;
}

// The symmetric gradient G of the Laplacian (the matrix `g`) to that of the adjacency, to `out`; `adjacency` is
// overwritten. With s = `root`: N = s_i S_ij s_j, q_i = s_i^2 sum_k G_ik N_ik, and -s_i G_ij s_j +- (q_i + q_j) / 2.
template <class T>
SK_INLINE void laplacian_adjoint(int n, Vec<T>* adjacency, const Vec<T>* root, const Vec<T>* g, Vec<T>* out) {
  const Vec<T> zero{}, half = zero + T(0.5);
  Vec<T> q[kMaxN];
  for (int i = 0; i < n; ++i) {
    q[i] = zero;
    for (int j = 0; j <= i; ++j) {
      // One root at a time: the product of both may leave the range where N does not.
      const Vec<T> s = fma(adjacency[i * n + j], half, adjacency[j * n + i] * half), scaled = s * root[i] * root[j];
      adjacency[i * n + j] = scaled;
      q[i] = fma(g[i * n + j], scaled, q[i]);
      if (j < i) q[j] = fma(g[i * n + j], scaled, q[j]);
    }
  }
  for (int i = 0; i < n; ++i) q[i] = root[i] * (root[i] * q[i]) * half;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      const Vec<T> degrees = q[i] + q[j];
      const Vec<T> turned = select(less(adjacency[i * n + j], zero), -degrees, degrees);
      const Mask<T> both = greater(root[i], zero) & greater(root[j], zero);
      out[i * n + j] = out[j * n + i] = select(both, fnma(root[i] * g[i * n + j], root[j], turned), zero);
    }
  }
}

template <class T>
void adjoint(const T* adjacency, const Encodings<const T>& saved, const Cotangents<T>& grad, int64_t batch,
             int n, int first, int k, const GapRule& rule, T* grad_adjacency) {
  constexpr int lanes = kLanes<T>;
  const bool past_caches = batch * n * n * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    const int rest = n - k;
    auto& w = workspace<AdjointWorkspace<T>>();
    const Vec<T> zero{}, nan = splat(std::numeric_limits<T>::quiet_NaN());
    for (int64_t item = begin * lanes; item < batch && item < end * lanes; item += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(batch - item, lanes));
      const int64_t after = item + count, upcoming = std::min<int64_t>(batch - after, lanes);
      Prefetcher own_adjacency, next_pe, next_other, next_gradient;
      own_adjacency.aim(adjacency + item * n * n, int64_t{count} * n * n);
      next_pe.aim(saved.pe_rows + after * k * n, upcoming * k * n);
      next_other.aim(saved.other_rows + after * rest * n, upcoming * rest * n);
      if (grad.pe) next_gradient.aim(grad.pe + after * k * n, upcoming * k * n);
      const T* other = saved.other_rows + item * rest * n;
      gather_items(other, rest * n, first * n, count, w.vectors);
      gather_items(saved.pe_rows + item * k * n, k * n, k * n, count, w.vectors + first * n);
      gather_items(other + first * n, rest * n, (rest - first) * n, count, w.vectors + (first + k) * n);
      gather_items(saved.values + item * n, n, n, count, w.values);
      gather_items(saved.inverse_root + item * n, n, n, count, w.root);
      if (grad.values) gather_items(grad.values + item * n, n, n, count, w.value_gradient);
      if (grad.pe) gather_items(grad.pe + item * k * n, k * n, k * n, count, w.gradient);

      // The gradient of a graph that failed is NaN; but 0 if the loss leaves it out.
      const Mask<T> failed = !equal(w.values[0], w.values[0]);
      Mask<T> used = none_set<T>();
      if (any(failed)) {
        if (grad.values) used = used | any_nonzero<T>(w.value_gradient, n);
        if (grad.pe) used = used | any_nonzero<T>(w.gradient, k * n);
      }

      const Vec<T>* v = w.vectors;  // v[j * n + a] = component a of eigenvector j
      if (grad.pe) {
        for (int i = 0; i < n * n; ++i) w.middle[i] = zero;
        const int column = grad.columns ? 1 : n, component = grad.columns ? k : 1;
        product<T, false>(n, k, n, v, n, 1, w.gradient, column, component, w.middle + first, n, own_adjacency,
                          n);  // M = V^T gV
        weigh_pairs<T>(n, rule, w.values, grad.values ? w.value_gradient : nullptr, w.middle);
        product<T, false>(n, n, n, w.middle, n, 1, v, 1, n, w.gradient, n, next_gradient, n);  // S V^T
      } else {
        for (int j = 0; j < n; ++j)
          for (int a = 0; a < n; ++a) w.gradient[j * n + a] = w.value_gradient[j] * v[j * n + a];
      }
      product<T, true>(n, n, n, w.gradient, 1, n, v, 1, n, w.middle, n, next_pe, 2 * n);  // G = V (S V^T)
      next_other.advance(rest * n);

      gather_items(adjacency + item * n * n, n * n, n * n, count, w.vectors);
      laplacian_adjoint<T>(n, w.vectors, w.root, w.middle, w.gradient);
      if (any(failed))
        for (int i = 0; i < n * n; ++i) w.gradient[i] = select(failed, select(used, nan, zero), w.gradient[i]);
      T* staging = reinterpret_cast<T*>(w.middle);
      scatter_items(w.gradient, n * n, count, staging);
      copy_out(staging, static_cast<int64_t>(count) * n * n, past_caches, grad_adjacency + item * n * n);
    }
    stream_fence();
  });
}

// ---- launchers ----------------------------------------------------------------------------------------------------

void laplacian_pe_fwd(const Tensor adjacency, int64_t first, bool canonical, double cluster_gap, Tensor eigenvalues,
                      Tensor pe_rows, Tensor other_rows, Tensor inverse_root, Tensor components, Tensor info) {
  const int64_t batch = adjacency.size(0);
  const int n = static_cast<int>(adjacency.size(1)), k = static_cast<int>(pe_rows.size(1));
  if (batch == 0 || n == 0) return;
  STD_TORCH_CHECK(n <= kMaxN, "laplacian_pe_fwd: n must be at most ", kMaxN);
  STD_TORCH_CHECK(first >= 0 && first + k <= n, "laplacian_pe_fwd: rows ", first, " to ", first + k, " of ", n);
  const NullSpaceRule rule{canonical, cluster_gap};
  const auto run = [&]<class T>(T) {
    const auto data = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    const auto flags = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
    const Encodings<T> out{data(eigenvalues),  data(pe_rows),     data(other_rows),
                           data(inverse_root), flags(components), flags(info)};
    const auto* from = static_cast<const T*>(adjacency.const_data_ptr());
    encode<T>(from, batch, n, static_cast<int>(first), k, rule, out);
  };
  adjacency.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

void laplacian_pe_bwd(const Tensor adjacency, const Tensor eigenvalues, const Tensor pe_rows, const Tensor other_rows,
                      const Tensor inverse_root, std::optional<Tensor> grad_eigenvalues, std::optional<Tensor> grad_pe,
                      bool columns, int64_t first, int64_t mode, double gap_floor, double noise_kappa,
                      Tensor grad_adjacency) {
  const int64_t batch = adjacency.size(0);
  const int n = static_cast<int>(adjacency.size(1)), k = static_cast<int>(pe_rows.size(1));
  if (batch == 0 || n == 0) return;
  STD_TORCH_CHECK(n <= kMaxN, "laplacian_pe_bwd: n must be at most ", kMaxN);
  STD_TORCH_CHECK(first >= 0 && first + k <= n, "laplacian_pe_bwd: rows ", first, " to ", first + k, " of ", n);
  STD_TORCH_CHECK(mode >= kAuto && mode <= kRaw, "laplacian_pe_bwd: unknown mode ", mode);
  STD_TORCH_CHECK(grad_eigenvalues || grad_pe, "laplacian_pe_bwd: no gradient given");
  const GapRule rule{mode, gap_floor, noise_kappa};
  const auto run = [&]<class T>(T) {
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    const Encodings<const T> saved{data(eigenvalues), data(pe_rows), data(other_rows), data(inverse_root), {}, {}};
    const Cotangents<T> grad{data(grad_eigenvalues), data(grad_pe), columns};
    auto* out = static_cast<T*>(grad_adjacency.mutable_data_ptr());
    adjoint<T>(data(adjacency), saved, grad, batch, n, static_cast<int>(first), k, rule, out);
  };
  adjacency.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "laplacian_pe_fwd(Tensor adjacency, int first, bool canonical, float cluster_gap, Tensor(a!) eigenvalues, "
      "Tensor(b!) pe_rows, Tensor(c!) other_rows, Tensor(d!) inverse_root, Tensor(e!) components, Tensor(f!) info) -> "
      "()");
  m.def(
      "laplacian_pe_bwd(Tensor adjacency, Tensor eigenvalues, Tensor pe_rows, Tensor other_rows, Tensor inverse_root, "
      "Tensor? grad_eigenvalues, Tensor? grad_pe, bool columns, int first, int mode, float gap_floor, "
      "float noise_kappa, Tensor(a!) grad_adjacency) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("laplacian_pe_fwd", TORCH_BOX(&stablekern::laplacian_pe_fwd));
  m.impl("laplacian_pe_bwd", TORCH_BOX(&stablekern::laplacian_pe_bwd));
}
