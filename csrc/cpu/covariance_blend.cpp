// Hermitian parts over their traces, blended and loaded, and the adjoint; the mathematics is in
// stablekern/ops/covariance_blend.py.
//
// A matrix is walked in pairs of square tiles that mirror each other, one row of a tile in one vector: what is read at
// (i, j) and (j, i) is all that the results at both places need, so each input is read once and the result written
// once, exactly Hermitian. A complex number moves through a transpose as one unit.
//
// The division by a trace is a product with two factors, a power of two that brings the trace near 1 and the rest:
// the reciprocal of a subnormal trace would overflow.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "stablekern/complex_simd.h"
#include "stablekern/simd.h"

namespace stablekern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainEntries = 16 * 1024;       // entries of matrices that are worth a thread
constexpr int64_t kStreamBytes = 2 * 1024 * 1024;  // a result larger than a core's L2 leaves past the caches
constexpr int32_t kNoTrace = 1, kNonFinite = 2;

template <class E>
struct Square {
  using T = RealOf<E>;
  static constexpr int kParts = sizeof(E) / sizeof(T);
  static constexpr int kSide = std::max<int>(1, kVectorBytes / static_cast<int>(sizeof(E)));

  struct Tile {
    Vec<T> row[kSide];
  };

  static SK_INLINE Tile load_tile(const T* from, int64_t n, int rows, int columns) {
    Tile t;
    for (int r = 0; r < kSide; ++r) {
      const T* at = from + r * n * kParts;
      t.row[r] = r >= rows ? Vec<T>{} : columns == kSide ? load(at) : load_first(at, columns * kParts);
    }
    return t;
  }

  static SK_INLINE void store_tile(T* to, int64_t n, int rows, int columns, const Tile& t, bool streaming) {
    for (int r = 0; r < rows; ++r) {
      T* at = to + r * n * kParts;
      if (streaming)
        stream<T>(at, t.row[r]);
      else if (columns == kSide)
        store(at, t.row[r]);
      else
        store_first(at, t.row[r], columns * kParts);
    }
  }

  // Rows to columns, conjugated.
  static SK_INLINE Tile mirrored(const Tile& t) {
    Tile m;
    if constexpr (sizeof(E) == 8 && kParts == 2) {
      Vec<double> units[kSide];
      for (int r = 0; r < kSide; ++r) units[r] = (Vec<double>)t.row[r];
      transpose<double>(units);
      for (int r = 0; r < kSide; ++r) m.row[r] = (Vec<T>)units[r];
    } else if constexpr (kParts == 1) {
      m = t;
      transpose<T>(m.row);
    } else {
      for (int r = 0; r < kSide; ++r)
        for (int c = 0; c < kSide; ++c)
          for (int p = 0; p < 2; ++p) m.row[r][2 * c + p] = t.row[c][2 * r + p];
    }
    if constexpr (kParts == 2) {
      Vec<T> sign{};
      for (int k = 1; k < kLanes<T>; k += 2) sign[k] = -T(0);
      for (int r = 0; r < kSide; ++r) m.row[r] = flip_sign(m.row[r], sign);
    }
    return m;
  }

  // The Hermitian part at a tile from what stands there and at its mirror image; the halves cannot overflow.
  static SK_INLINE Tile hermitian(const Tile& here, const Tile& there) {
    Tile h = mirrored(there);
    const Vec<T> half = splat<T>(T(0.5));
    for (int r = 0; r < kSide; ++r) h.row[r] = fma(half, here.row[r], half * h.row[r]);
    return h;
  }
};

// What an input's Hermitian part is multiplied with: `up` brings it near 1, `rest` has the weight in it.
template <class T>
struct Factor {
  Vec<T> up, rest;
};

template <class T>
T upward(double trace) {
  int exponent = 0;
  std::frexp(trace, &exponent);
  constexpr int top = std::numeric_limits<T>::max_exponent - 2, bottom = std::numeric_limits<T>::min_exponent;
  return std::ldexp(T(1), std::clamp(-exponent, bottom, top));
}

template <class T>
Factor<T> factor(double weight, double trace) {
  const T up = upward<T>(trace);
  return {splat(up), splat(static_cast<T>(weight / (trace * up)))};
}

struct Coefficients {
  double pred, samp, eye;
};

template <class E>
struct Problem {
  using T = RealOf<E>;
  int64_t batch, n;
  const T* pred;
  const T* samp;     // null: none
  const T* weights;  // null: the constants
  Coefficients constants;

  static constexpr int parts = Square<E>::kParts;
  int64_t entries() const { return n * n * parts; }
  int64_t grain() const { return std::max<int64_t>(1, kGrainEntries / std::max<int64_t>(1, n * n)); }

  Coefficients coefficients(int64_t b) const {
    if (weights == nullptr) return constants;
    return {weights[3 * b], weights[3 * b + 1], weights[3 * b + 2]};
  }

  bool streams(const T* result) const {
    return batch * entries() * static_cast<int64_t>(sizeof(T)) > kStreamBytes &&
           reinterpret_cast<uintptr_t>(result) % kVectorBytes == 0 && n % Square<E>::kSide == 0;
  }
};

template <class E>
Problem<E> describe(const Tensor& pred, const Tensor& samp, const Tensor& weights, Coefficients constants) {
  using T = RealOf<E>;
  const auto given = [](const Tensor& t) { return t.numel() ? static_cast<const T*>(t.const_data_ptr()) : nullptr; };
  return {pred.size(0), pred.size(1), static_cast<const T*>(pred.const_data_ptr()), given(samp), given(weights),
          constants};
}

// ---- forward ------------------------------------------------------------------------------------------------------

// The trace of a matrix and what is wrong with it. Diagonal entries of both signs can leave a positive rounding error.
template <class E>
double trace_of(const Problem<E>& p, const RealOf<E>* matrix, int32_t& info) {
  using T = RealOf<E>;
  double trace = 0, size = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    const double entry = matrix[i * (p.n + 1) * p.parts];
    trace += entry;
    size += std::abs(entry);
  }
  if (!std::isfinite(static_cast<T>(trace)))
    info |= kNonFinite;
  else if (trace <= static_cast<double>(p.n) * std::numeric_limits<T>::epsilon() * size)
    info |= kNoTrace;
  return trace;
}

template <class E>
void forward(const Problem<E>& p, RealOf<E>* out, double* traces, int32_t* info) {
  using T = RealOf<E>;
  using S = Square<E>;
  constexpr int side = S::kSide;
  const bool streaming = p.streams(out);
  torch::stable::parallel_for(0, p.batch, p.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* pred = p.pred + b * p.entries();
      const T* samp = p.samp == nullptr ? nullptr : p.samp + b * p.entries();
      T* to = out + b * p.entries();
      int32_t status = 0;
      traces[2 * b] = trace_of(p, pred, status);
      traces[2 * b + 1] = samp == nullptr ? 1 : trace_of(p, samp, status);
      const Coefficients weight = p.coefficients(b);
      const Factor<T> first = factor<T>(weight.pred, traces[2 * b]), second = factor<T>(weight.samp, traces[2 * b + 1]);
      const T load_on_diagonal = static_cast<T>(weight.eye);
      Vec<T> check{};  // 0 * x is NaN for an x that is not finite
      for (int64_t i = 0; i < p.n; i += side) {
        const int rows = static_cast<int>(std::min<int64_t>(side, p.n - i));
        for (int64_t j = i; j < p.n; j += side) {
          const int columns = static_cast<int>(std::min<int64_t>(side, p.n - j));
          const int64_t here = (i * p.n + j) * p.parts, there = (j * p.n + i) * p.parts;
          const auto part = [&](const T* matrix) {
            return S::hermitian(S::load_tile(matrix + here, p.n, rows, columns),
                                S::load_tile(matrix + there, p.n, columns, rows));
          };
          typename S::Tile h = part(pred);
          for (int r = 0; r < side; ++r) {
            check = fma(h.row[r], Vec<T>{}, check);
            h.row[r] = h.row[r] * first.up * first.rest;
          }
          if (samp != nullptr) {
            const typename S::Tile other = part(samp);
            for (int r = 0; r < side; ++r) {
              check = fma(other.row[r], Vec<T>{}, check);
              h.row[r] = fma(other.row[r] * second.up, second.rest, h.row[r]);
            }
          }
          if (i == j)
            for (int r = 0; r < side; ++r) h.row[r][r * p.parts] += load_on_diagonal;
          S::store_tile(to + here, p.n, rows, columns, h, streaming);
          if (i != j) S::store_tile(to + there, p.n, columns, rows, S::mirrored(h), streaming);
        }
      }
      if (lane_bits(equal(check, Vec<T>{})) != kAllLanes<T>) status |= kNonFinite;
      info[b] = status;
      if (status != 0)
        for (int64_t k = 0; k < p.entries(); ++k) to[k] = k % p.parts ? 0 : std::numeric_limits<T>::quiet_NaN();
    }
    stream_fence();
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

// <g, X> over a tile, X read where the tile lies.
template <class E>
SK_INLINE Vec<RealOf<E>> product(const typename Square<E>::Tile& g,
                                                const RealOf<E>* matrix, int64_t n, int rows,
                                                int columns, Vec<RealOf<E>> up,
                                                Vec<RealOf<E>> sum) {
  const typename Square<E>::Tile x = Square<E>::load_tile(matrix, n, rows, columns);
  for (int r = 0; r < Square<E>::kSide; ++r) sum = fma(g.row[r], x.row[r] * up, sum);
  return sum;
}

template <class E>
void backward(const Problem<E>& p, const RealOf<E>* grad, const double* traces, const int32_t* info,
              RealOf<E>* grad_pred, RealOf<E>* grad_weights) {
  using T = RealOf<E>;
  using S = Square<E>;
  constexpr int side = S::kSide;
  const bool streaming = p.streams(grad_pred);
  torch::stable::parallel_for(0, p.batch, p.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* g = grad + b * p.entries();
      const T* pred = p.pred + b * p.entries();
      const T* samp = p.samp == nullptr || grad_weights == nullptr ? nullptr : p.samp + b * p.entries();
      T* to = grad_pred == nullptr ? nullptr : grad_pred + b * p.entries();
      if (info[b] != 0) {
        if (to != nullptr) std::fill(to, to + p.entries(), T(0));
        if (grad_weights != nullptr) std::fill(grad_weights + 3 * b, grad_weights + 3 * b + 3, T(0));
        continue;
      }
      const Factor<T> first = factor<T>(p.coefficients(b).pred, traces[2 * b]);
      const Vec<T> up[2] = {first.up, splat(upward<T>(traces[2 * b + 1]))};
      double along[2] = {0, 0};  // <G, H> of each input, H scaled up
      const auto scaled = [&](typename S::Tile t) {
        for (int r = 0; r < side; ++r) t.row[r] = t.row[r] * first.up * first.rest;
        return t;
      };
      const auto gradient = [&](int64_t i, int64_t j, int rows, int columns) {
        return S::hermitian(S::load_tile(g + (i * p.n + j) * p.parts, p.n, rows, columns),
                            S::load_tile(g + (j * p.n + i) * p.parts, p.n, columns, rows));
      };
      for (int64_t i = 0; i < p.n; i += side) {
        const int rows = static_cast<int>(std::min<int64_t>(side, p.n - i));
        Vec<T> sums[2] = {};
        for (int64_t j = i; j < p.n; j += side) {
          const int columns = static_cast<int>(std::min<int64_t>(side, p.n - j));
          const int64_t here = (i * p.n + j) * p.parts, there = (j * p.n + i) * p.parts;
          const typename S::Tile h = gradient(i, j, rows, columns);
          const typename S::Tile mirror = i == j ? h : S::mirrored(h);
          for (int k = 0; k < 2; ++k) {
            const T* matrix = k == 0 ? pred : samp;
            if (matrix == nullptr) continue;
            sums[k] = product<E>(h, matrix + here, p.n, rows, columns, up[k], sums[k]);
            if (i != j) sums[k] = product<E>(mirror, matrix + there, p.n, columns, rows, up[k], sums[k]);
          }
          if (to == nullptr || i == j) continue;
          S::store_tile(to + here, p.n, rows, columns, scaled(h), streaming);
          S::store_tile(to + there, p.n, columns, rows, scaled(mirror), streaming);
        }
        for (int k = 0; k < 2; ++k) along[k] += static_cast<double>(horizontal_sum(sums[k]));
      }
      const double share = along[0] / (traces[2 * b] * first.up[0]);
      // The tiles on the diagonal wait for the sum over all others.
      for (int64_t i = 0; to != nullptr && i < p.n; i += side) {
        const int rows = static_cast<int>(std::min<int64_t>(side, p.n - i));
        typename S::Tile h = gradient(i, i, rows, rows);
        for (int r = 0; r < side; ++r) h.row[r][r * p.parts] -= static_cast<T>(share);
        S::store_tile(to + i * (p.n + 1) * p.parts, p.n, rows, rows, scaled(h), streaming);
      }
      if (grad_weights == nullptr) continue;
      double trace = 0;
      for (int64_t i = 0; i < p.n; ++i) trace += g[i * (p.n + 1) * p.parts];
      grad_weights[3 * b] = static_cast<T>(share);
      grad_weights[3 * b + 1] = static_cast<T>(along[1] / (traces[2 * b + 1] * up[1][0]));
      grad_weights[3 * b + 2] = static_cast<T>(trace);
    }
    stream_fence();
  });
}

template <class Function>
void for_type(const Tensor& matrices, const Function& function) {
  switch (matrices.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::ComplexFloat:
      return function(std::complex<float>{});
    default:
      return function(std::complex<double>{});
  }
}

void covariance_blend_fwd(Tensor pred, Tensor samp, Tensor weights, double by_pred, double by_samp, double by_eye,
                          Tensor out, Tensor traces, Tensor info) {
  for_type(pred, [&]<class E>(E) {
    forward(describe<E>(pred, samp, weights, {by_pred, by_samp, by_eye}),
            static_cast<RealOf<E>*>(out.mutable_data_ptr()),
            static_cast<double*>(traces.mutable_data_ptr()), static_cast<int32_t*>(info.mutable_data_ptr()));
  });
}

void covariance_blend_bwd(Tensor grad, Tensor pred, Tensor samp, Tensor weights, double by_pred, Tensor traces,
                          Tensor info, Tensor grad_pred, Tensor grad_weights) {
  for_type(pred, [&]<class E>(E) {
    using T = RealOf<E>;
    const auto wanted = [](Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    backward(describe<E>(pred, samp, weights, {by_pred, 0, 0}), static_cast<const T*>(grad.const_data_ptr()),
             static_cast<const double*>(traces.const_data_ptr()), static_cast<const int32_t*>(info.const_data_ptr()),
             wanted(grad_pred), wanted(grad_weights));
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "covariance_blend_fwd(Tensor pred, Tensor samp, Tensor weights, float by_pred, float by_samp, float by_eye,"
      " Tensor(a!) out, Tensor(b!) traces, Tensor(c!) info) -> ()");
  m.def(
      "covariance_blend_bwd(Tensor grad, Tensor pred, Tensor samp, Tensor weights, float by_pred, Tensor traces,"
      " Tensor info, Tensor(a!) grad_pred, Tensor(b!) grad_weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("covariance_blend_fwd", TORCH_BOX(&stablekern::covariance_blend_fwd));
  m.impl("covariance_blend_bwd", TORCH_BOX(&stablekern::covariance_blend_bwd));
}
