// Cosines of all pairs of nodes and their adjoint; the mathematics is in stablekern/ops/cosine_edges.py.
//
// Forward, the lanes are time steps: a block of them is transposed, a few features at a time, and all dot products are
// tiles of fused multiply-adds without a horizontal sum; norms, clamps and the stores along time are vertical too.
// Backward, the lanes are features: the weights of a block of steps are computed with time in the lanes, then one
// (n, n) matrix per step is applied to the step's rows, tile by tile in registers.
//
// The rows of a step are copied together first: at their own stride, often a multiple of 4096 bytes, they would all
// fall into the same few sets of the cache.
//
// Squares are taken as they are while every norm of the block is in a range where nothing over- or underflows. Otherwise,
// for the mean and at the end of time, the block is done again from rows that have been scaled by a power of two, which
// gives the same bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "stablekern/simd.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

#if defined(SK_AVX512)
constexpr int kTile = 4;                  // forward: kTile^2 sums in registers
constexpr int kRows = 5, kColumns = 4;    // backward: rows of the result, vectors of features
#else
constexpr int kTile = 2;
constexpr int kRows = 2, kColumns = 4;
#endif
constexpr int64_t kGrain = 4;                      // blocks of steps that are worth a thread
constexpr int64_t kStreamBytes = 2 * 1024 * 1024;  // a result larger than a core's L2 leaves past the caches

template <class T>
struct Problem {
  int64_t batch, nodes, steps, features;
  const T* x;
  int64_t batch_stride, node_stride, step_stride;  // the features are dense
  bool centre;
  T eps;

  static constexpr int lanes = kLanes<T>;
  int64_t blocks() const { return (steps + lanes - 1) / lanes; }
  int64_t padded() const { return (features + lanes - 1) / lanes * lanes; }
  int64_t pairs() const { return nodes * (nodes - 1) / 2; }
};

template <class T>
Problem<T> describe(const Tensor& x, bool centre, double eps) {
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          static_cast<const T*>(x.const_data_ptr()),
          x.stride(0),
          x.stride(1),
          x.stride(2),
          centre,
          static_cast<T>(eps)};
}

// ---- rows ---------------------------------------------------------------------------------------------------------

template <class T>
void copy_row(T* to, const T* from, int64_t features) {
  int64_t k = 0;
  for (; k + kLanes<T> <= features; k += kLanes<T>) store(to + k, load(from + k));
  if (k < features) store(to + k, load_first(from + k, static_cast<int>(features - k)));
}

template <class T>
T row_mean(const T* row, int64_t features) {  // the padding is 0
  Vec<T> sum{};
  for (int64_t k = 0; k < features; k += kLanes<T>) sum += load(row + k);
  return horizontal_sum(sum) / static_cast<T>(features);
}

// Twice, because the first mean is rounded; the padding stays 0.
template <class T>
void centre_row(T* row, int64_t features) {
  T mean = row_mean(row, features);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t k = 0; k < features; ++k) row[k] -= mean;
    mean = row_mean(row, features);
  }
}

// The row times a power of two that brings its largest entry near 1, less its mean if so asked. Returns the power.
template <class T>
T scaled_row(T* to, const T* from, int64_t features, bool centre) {
  copy_row(to, from, features);
  Vec<T> largest{};
  for (int64_t k = 0; k < features; k += kLanes<T>) largest = max(largest, abs(load(to + k)));
  // The bits of magnitudes have their order. What power a NaN leads to does not matter.
  const T down = power_of_two<T>((Vec<T>)(IVec<T>{} + horizontal_max<T>((IVec<T>)largest))).down[0];
  for (int64_t k = 0; k < features; k += kLanes<T>) store(to + k, load(to + k) * splat(down));
  if (centre) centre_row(to, features);
  return down;
}

template <class T>
void clean_row(T* row, int64_t features) {
  const Vec<T> largest = splat(std::numeric_limits<T>::max());
  for (int64_t k = 0; k < features; k += kLanes<T>) {
    const Vec<T> v = load(row + k);
    store(row + k, select<T>(less_equal(abs(v), largest), v, Vec<T>{}));
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------

// Where the sum i, j >= i, is kept.
SK_INLINE int64_t place(int64_t nodes, int64_t i, int64_t j) { return i * nodes - i * (i - 1) / 2 + (j - i); }

template <class T, int kI, int kJ, bool kDiagonal>
void tile(Vec<T>* sums, const Vec<T>* slab, int64_t nodes, int64_t i0, int64_t j0, int width, bool first) {
  constexpr int lanes = kLanes<T>;
  Vec<T> a[kI][kJ];
  for (int p = 0; p < kI; ++p)
    for (int q = kDiagonal ? p : 0; q < kJ; ++q) a[p][q] = first ? Vec<T>{} : sums[place(nodes, i0 + p, j0 + q)];
  for (int k = 0; k < width; ++k) {
    Vec<T> left[kI], right[kJ];
    for (int p = 0; p < kI; ++p) left[p] = slab[(i0 + p) * lanes + k];
    for (int q = 0; q < kJ; ++q) right[q] = kDiagonal ? left[q] : slab[(j0 + q) * lanes + k];
    for (int p = 0; p < kI; ++p)
      for (int q = kDiagonal ? p : 0; q < kJ; ++q) a[p][q] = fma(left[p], right[q], a[p][q]);
  }
  for (int p = 0; p < kI; ++p)
    for (int q = kDiagonal ? p : 0; q < kJ; ++q) sums[place(nodes, i0 + p, j0 + q)] = a[p][q];
}

template <class T, int kSize = kTile>
void diagonal_tile(Vec<T>* sums, const Vec<T>* slab, int64_t nodes, int64_t i0, int width, bool first) {
  if (nodes - i0 >= kSize)
    tile<T, kSize, kSize, true>(sums, slab, nodes, i0, i0, width, first);
  else if constexpr (kSize > 1)
    diagonal_tile<T, kSize - 1>(sums, slab, nodes, i0, width, first);
}

template <class T, int kSize = kTile>
void other_tile(Vec<T>* sums, const Vec<T>* slab, int64_t nodes, int64_t i0, int64_t j0, int width, bool first) {
  if (nodes - j0 >= kSize)
    tile<T, kTile, kSize, false>(sums, slab, nodes, i0, j0, width, first);
  else if constexpr (kSize > 1)
    other_tile<T, kSize - 1>(sums, slab, nodes, i0, j0, width, first);
}

// All dot products of one block of steps, a lane for each.
template <class T>
void products(const T* rows, int64_t node_stride, int64_t step_stride, int64_t nodes, int64_t features, Vec<T>* slab,
              Vec<T>* sums) {
  constexpr int lanes = kLanes<T>;
  for (int64_t k = 0; k < features; k += lanes) {
    const int width = static_cast<int>(std::min<int64_t>(lanes, features - k));
    // One line of each row at a time is no pattern that the machine would foresee: fetch the next features, then those of
    // the next block of steps. Past the end of x the hint does nothing.
    const int64_t ahead = k + lanes < features ? lanes : lanes * step_stride - k;
    for (int64_t i = 0; i < nodes; ++i) {
      const T* from = rows + i * node_stride + k;
      Vec<T> r[lanes];
      for (int t = 0; t < lanes; ++t) {
        r[t] = width == lanes ? load(from + t * step_stride) : load_first(from + t * step_stride, width);
        __builtin_prefetch(from + t * step_stride + ahead, 0, 2);
      }
      transpose<T>(r);
      for (int t = 0; t < lanes; ++t) slab[i * lanes + t] = r[t];
    }
    for (int64_t i = 0; i < nodes; i += kTile) {
      diagonal_tile<T>(sums, slab, nodes, i, width, k == 0);
      for (int64_t j = i + kTile; j < nodes; j += kTile) other_tile<T>(sums, slab, nodes, i, j, width, k == 0);
    }
  }
}

template <class T>
struct ForwardScratch {
  std::vector<Vec<T>> slab, sums, inverse, scale, rows;

  explicit ForwardScratch(const Problem<T>& p)
      : slab(p.nodes * kLanes<T>), sums(p.nodes * (p.nodes + 1) / 2), inverse(p.nodes), scale(p.nodes) {}
};

// Whether all squares of the block kept their precision.
template <class T>
bool norms_in_range(const std::vector<Vec<T>>& sums, int64_t nodes) {
  const Vec<T> low = splat(std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon());
  const Vec<T> high = splat(std::numeric_limits<T>::max());
  Mask<T> good = !none_set<T>();
  for (int64_t i = 0; i < nodes; ++i) {
    const Vec<T> size = sums[place(nodes, i, i)];
    good = good & greater_equal(size, low) & less_equal(size, high);
  }
  return lane_bits(good) == kAllLanes<T>;
}

template <class T>
void forward_block(const Problem<T>& p, int64_t b, int64_t t0, ForwardScratch<T>& scratch, T* edges, T* inverse_norm) {
  constexpr int lanes = kLanes<T>;
  const int64_t n = p.nodes;
  const int count = static_cast<int>(std::min<int64_t>(lanes, p.steps - t0));
  const T* x = p.x + b * p.batch_stride + t0 * p.step_stride;
  bool plain = !p.centre && count == lanes;
  if (plain) {
    products(x, p.node_stride, p.step_stride, n, p.features, scratch.slab.data(), scratch.sums.data());
    plain = norms_in_range<T>(scratch.sums, n);
  }
  if (plain) {
    std::fill(scratch.scale.begin(), scratch.scale.end(), splat<T>(1));
  } else {
    const int64_t width = p.padded();
    scratch.rows.assign(n * width, Vec<T>{});
    T* rows = reinterpret_cast<T*>(scratch.rows.data());
    for (int64_t i = 0; i < n; ++i) {
      scratch.scale[i] = splat<T>(1);
      for (int t = 0; t < count; ++t)
        scratch.scale[i][t] = scaled_row(rows + (i * lanes + t) * width, x + i * p.node_stride + t * p.step_stride,
                                         p.features, p.centre);
    }
    products(rows, lanes * width, width, n, p.features, scratch.slab.data(), scratch.sums.data());
  }
  const Vec<T> one = splat<T>(1), ceiling = splat<T>(1 / p.eps), infinity = splat(std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < n; ++i) {
    const Vec<T> size = sqrt(scratch.sums[place(n, i, i)]);
    const Vec<T> inverse = min(one / size, ceiling / scratch.scale[i]);
    scratch.inverse[i] = select<T>(greater(size, Vec<T>{}) & less(size, infinity), inverse, Vec<T>{});
    store_first(inverse_norm + (b * n + i) * p.steps + t0, scratch.inverse[i] * scratch.scale[i], count);
  }
  T* to = edges + b * p.pairs() * p.steps + t0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j, to += p.steps) {
      const Vec<T> s = scratch.sums[place(n, i, j)] * scratch.inverse[i] * scratch.inverse[j];
      store_first(to, min(one, max(-one, s)), count);  // in this order a NaN stays one
    }
}

template <class T>
void forward(const Problem<T>& p, T* edges, T* inverse_norm) {
  torch::stable::parallel_for(0, p.batch * p.blocks(), kGrain, [&](int64_t begin, int64_t end) {
    ForwardScratch<T> scratch(p);
    for (int64_t task = begin; task < end; ++task)
      forward_block(p, task / p.blocks(), task % p.blocks() * kLanes<T>, scratch, edges, inverse_norm);
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct BackwardScratch {
  std::vector<Vec<T>> weights, inverse, slope, unit, diagonal, rows, results, scale;

  explicit BackwardScratch(const Problem<T>& p)
      : weights(p.nodes * p.nodes),
        inverse(p.nodes),
        slope(p.nodes),
        unit(p.nodes),
        diagonal(p.nodes),
        rows(p.nodes * p.padded() / kLanes<T>),
        results(p.centre ? rows.size() : 0),
        scale(p.nodes) {}
};

// Rows i0 .. i0 + kI of the result, kQ vectors of features from k on: one weight matrix times the rows of the step.
template <class T, int kI, int kQ>
void apply_tile(const T* weights, const T* rows, int64_t width, int64_t nodes, T* to, int64_t stride, int64_t features,
                bool streaming) {
  constexpr int lanes = kLanes<T>;
  Vec<T> a[kI][kQ];
  for (int p = 0; p < kI; ++p)
    for (int q = 0; q < kQ; ++q) a[p][q] = Vec<T>{};
  for (int64_t j = 0; j < nodes; ++j) {
    Vec<T> v[kQ];
    for (int q = 0; q < kQ; ++q) v[q] = load(rows + j * width + q * lanes);
    for (int p = 0; p < kI; ++p) {
      const Vec<T> w = splat(weights[(p * nodes + j) * lanes]);
      for (int q = 0; q < kQ; ++q) a[p][q] = fma(w, v[q], a[p][q]);
    }
  }
  for (int p = 0; p < kI; ++p)
    for (int q = 0; q < kQ; ++q) {
      T* at = to + p * stride + q * lanes;
      if (streaming)
        stream<T>(at, a[p][q]);
      else
        store_first(at, a[p][q], static_cast<int>(std::min<int64_t>(lanes, features - q * lanes)));
    }
}

template <class T, int kI, int kQ = kColumns>
void apply_columns(const T* weights, const T* rows, int64_t width, int64_t k, int64_t nodes, T* to, int64_t stride,
                   int64_t features, bool streaming) {
  for (; width - k >= kQ * kLanes<T>; k += kQ * kLanes<T>)
    apply_tile<T, kI, kQ>(weights, rows + k, width, nodes, to + k, stride, features - k, streaming);
  if constexpr (kQ > 1)
    if (k < width) apply_columns<T, kI, kQ - 1>(weights, rows, width, k, nodes, to, stride, features, streaming);
}

template <class T, int kI = kRows>
void apply_rows(const T* weights, const T* rows, int64_t width, int64_t i, int64_t nodes, T* to, int64_t stride,
                int64_t features, bool streaming) {
  for (; nodes - i >= kI; i += kI)
    apply_columns<T, kI>(weights + i * nodes * kLanes<T>, rows, width, 0, nodes, to + i * stride, stride, features,
                         streaming);
  if constexpr (kI > 1)
    if (i < nodes) apply_rows<T, kI - 1>(weights, rows, width, i, nodes, to, stride, features, streaming);
}

// Whether products of two inverse norms and a gradient keep their precision.
template <class T>
bool products_in_range(const std::vector<Vec<T>>& inverse, int count) {
  const T high = std::sqrt(std::sqrt(std::sqrt(std::numeric_limits<T>::max())));
  Mask<T> good = !none_set<T>();
  for (const Vec<T> v : inverse) good = good & greater_equal(v, splat(1 / high)) & less_equal(v, splat(high));
  const uint32_t wanted = count == kLanes<T> ? kAllLanes<T> : (1u << count) - 1u;
  return (lane_bits(good) & wanted) == wanted;
}

template <class T>
struct Adjoint {
  const T* grad;
  const T* edges;
  const T* inverse_norm;
  T* dx;
  T grad_floor;
  bool streaming;
};

// The weights of a block of steps: row i of a step's matrix gives dx_i from the rows that `unit` belongs to.
template <class T>
void weigh(const Problem<T>& p, const Adjoint<T>& adjoint, int64_t b, int64_t t0, int count,
           BackwardScratch<T>& scratch) {
  const int64_t n = p.nodes;
  const Vec<T> zero{}, steepest = splat<T>(1 / adjoint.grad_floor), ceiling = splat<T>(1 / p.eps);
  for (int64_t i = 0; i < n; ++i) {
    scratch.diagonal[i] = zero;
    scratch.slope[i] = min(scratch.inverse[i], steepest);
    scratch.unit[i] = scratch.inverse[i] / scratch.scale[i];
  }
  int64_t at = b * p.pairs() * p.steps + t0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j, at += p.steps) {
      const Vec<T> s = load_first(adjoint.edges + at, count), given = load_first(adjoint.grad + at, count);
      // The NaN of a bad pair travels in its weight, and only if there is a gradient.
      const Vec<T> g = select<T>(equal(given, zero), zero, fma(s, zero, given));
      const Vec<T> radial = g * select<T>(equal(s, s), s, zero);
      scratch.diagonal[i] += radial;
      scratch.diagonal[j] += radial;
      scratch.weights[i * n + j] = scratch.slope[i] * g * scratch.unit[j];
      scratch.weights[j * n + i] = scratch.slope[j] * g * scratch.unit[i];
    }
  for (int64_t i = 0; i < n; ++i)
    scratch.weights[i * n + i] = select<T>(less(scratch.inverse[i], ceiling),
                                           -(scratch.slope[i] * scratch.diagonal[i] * scratch.unit[i]), zero);
}

template <class T>
void backward_block(const Problem<T>& p, const Adjoint<T>& adjoint, int64_t b, int64_t t0, BackwardScratch<T>& scratch) {
  constexpr int lanes = kLanes<T>;
  const int64_t n = p.nodes, width = p.padded();
  const int count = static_cast<int>(std::min<int64_t>(lanes, p.steps - t0));
  const T* x = p.x + b * p.batch_stride + t0 * p.step_stride;
  for (int64_t i = 0; i < n; ++i) {
    scratch.inverse[i] = load_first(adjoint.inverse_norm + (b * n + i) * p.steps + t0, count);
    scratch.scale[i] = splat<T>(1);
  }
  const bool plain = !p.centre && products_in_range<T>(scratch.inverse, count);
  scratch.rows.resize((plain ? 1 : lanes) * n * width / lanes);
  T* rows = reinterpret_cast<T*>(scratch.rows.data());
  if (!plain) {
    std::fill(scratch.rows.begin(), scratch.rows.end(), Vec<T>{});
    for (int t = 0; t < count; ++t)
      for (int64_t i = 0; i < n; ++i) {
        T* row = rows + (t * n + i) * width;
        scratch.scale[i][t] =
            scaled_row(row, x + i * p.node_stride + t * p.step_stride, p.features, p.centre);
        clean_row(row, p.features);
      }
  }
  weigh(p, adjoint, b, t0, count, scratch);
  for (int t = 0; t < count; ++t) {
    const T* weights = reinterpret_cast<const T*>(scratch.weights.data()) + t;
    const T* from = plain ? rows : rows + t * n * width;
    T* to = adjoint.dx + (b * n * p.steps + t0 + t) * p.features;
    const int64_t stride = p.steps * p.features;
    if (plain)
      for (int64_t i = 0; i < n; ++i)
        copy_row(rows + i * width, x + i * p.node_stride + t * p.step_stride, p.features);
    if (!p.centre) {
      apply_rows<T>(weights, from, width, 0, n, to, stride, p.features, adjoint.streaming);
      continue;
    }
    T* results = reinterpret_cast<T*>(scratch.results.data());
    apply_rows<T>(weights, from, width, 0, n, results, width, width, false);
    for (int64_t i = 0; i < n; ++i) {
      centre_row(results + i * width, p.features);
      std::copy_n(results + i * width, p.features, to + i * stride);
    }
  }
}

template <class T>
void backward(const Problem<T>& p, const Adjoint<T>& adjoint) {
  torch::stable::parallel_for(0, p.batch * p.blocks(), kGrain, [&](int64_t begin, int64_t end) {
    BackwardScratch<T> scratch(p);
    for (int64_t task = begin; task < end; ++task)
      backward_block(p, adjoint, task / p.blocks(), task % p.blocks() * kLanes<T>, scratch);
    if (adjoint.streaming) stream_fence();
  });
}

// ---- entry --------------------------------------------------------------------------------------------------------

template <class T>
void launch_fwd(const Tensor& x, bool centre, double eps, Tensor& edges, Tensor& inverse_norm) {
  forward(describe<T>(x, centre, eps), static_cast<T*>(edges.mutable_data_ptr()),
          static_cast<T*>(inverse_norm.mutable_data_ptr()));
}

void cosine_edges_fwd(Tensor x, bool centre, double eps, Tensor edges, Tensor inverse_norm) {
  if (x.scalar_type() == torch::headeronly::ScalarType::Float)
    launch_fwd<float>(x, centre, eps, edges, inverse_norm);
  else
    launch_fwd<double>(x, centre, eps, edges, inverse_norm);
}

template <class T>
void launch_bwd(const Tensor& grad, const Tensor& x, const Tensor& edges, const Tensor& inverse_norm, bool centre,
                double eps, double grad_floor, Tensor& dx) {
  T* to = static_cast<T*>(dx.mutable_data_ptr());
  const bool large = dx.numel() * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0 && x.size(3) % kLanes<T> == 0;
  backward(describe<T>(x, centre, eps), Adjoint<T>{static_cast<const T*>(grad.const_data_ptr()),
                                                   static_cast<const T*>(edges.const_data_ptr()),
                                                   static_cast<const T*>(inverse_norm.const_data_ptr()), to,
                                                   static_cast<T>(grad_floor), large && aligned && !centre});
}

void cosine_edges_bwd(Tensor grad, Tensor x, Tensor edges, Tensor inverse_norm, bool centre, double eps,
                      double grad_floor, Tensor dx) {
  if (x.scalar_type() == torch::headeronly::ScalarType::Float)
    launch_bwd<float>(grad, x, edges, inverse_norm, centre, eps, grad_floor, dx);
  else
    launch_bwd<double>(grad, x, edges, inverse_norm, centre, eps, grad_floor, dx);
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "cosine_edges_fwd(Tensor x, bool centre, float eps, Tensor(a!) edges, Tensor(b!) inverse_norm) -> ()");
  m.def(
      "cosine_edges_bwd(Tensor grad, Tensor x, Tensor edges, Tensor inverse_norm, bool centre, float eps,"
      " float grad_floor, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("cosine_edges_fwd", TORCH_BOX(&stablekern::cosine_edges_fwd));
  m.impl("cosine_edges_bwd", TORCH_BOX(&stablekern::cosine_edges_bwd));
}
