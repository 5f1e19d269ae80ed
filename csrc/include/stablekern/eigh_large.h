// Eigendecomposition of Hermitian matrices by LAPACK, one matrix per thread, in the gauge of `eigh`; and its backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "stablekern/eigh_lanes.h"
#include "stablekern/lapack.h"

namespace stablekern {

template <class S>
void fill_nan(S* data, int64_t length) {
  std::fill(data, data + length, S(std::numeric_limits<Real<S>>::quiet_NaN()));
}

// The vector `from`, turned so that its component of largest modulus, the first of equal ones, is real and > 0.
template <class S>
void write_in_gauge(const S* from, int n, S* to) {
  using T = Real<S>;
  T largest = squared(from[0]);
  int pivot = 0;
  for (int i = 1; i < n; ++i) {
    if (squared(from[i]) > largest) {
      largest = squared(from[i]);
      pivot = i;
    }
  }
  if constexpr (kComplex<S>) {
    const T size = std::sqrt(largest), re = from[pivot].real() / size, im = from[pivot].imag() / size;
    for (int i = 0; i < n; ++i)
      to[i] = {re * from[i].real() + im * from[i].imag(), re * from[i].imag() - im * from[i].real()};
    to[pivot] = size;
  } else {
    const T sign = from[pivot] < 0 ? T(-1) : T(1);
    for (int i = 0; i < n; ++i) to[i] = sign * from[i];
  }
}

template <class S>
void solve_large(const S* matrices, int64_t batch, int n, bool upper, Real<S>* values, S* rows, int32_t* info) {
  const int64_t size = static_cast<int64_t>(n) * n;
  for_each_matrix<S>(batch, n, [&](HermitianSolver<S>& solver, int64_t item) {
    Real<S>* w = values + item * n;
    S* to = rows + item * size;
    info[item] = solver.solve(matrices + item * size, upper);
    if (info[item] != 0) {
      fill_nan(w, n);
      fill_nan(to, size);
      return;
    }
    std::copy_n(solver.values.get(), n, w);
    for (int j = 0; j < n; ++j) write_in_gauge(solver.matrix + static_cast<int64_t>(j) * n, n, to + j * int64_t{n});
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// To the gradient of one eigenvector what the gauge adds: with turn = Im(v^H g), -i turn / v_p at the component p that
// the gauge makes real.
template <class S>
void fix_phase(const S* v, int n, S* g) {
  if constexpr (kComplex<S>) {
    Real<S> turn = 0;
    int pivot = -1;
    for (int i = 0; i < n; ++i) {
      turn += v[i].real() * g[i].imag() - v[i].imag() * g[i].real();
      // Exactly real in the gauge, whatever rounding did to the order of the moduli.
      if (v[i].imag() == 0 && v[i].real() > 0 && (pivot < 0 || v[i].real() > v[pivot].real())) pivot = i;
    }
    if (pivot >= 0) g[pivot] -= S(0, turn / v[pivot].real());
  }
}

// M, by columns, to S in place: S_ij = (M_ij - conj(M_ji)) F(w_j - w_i) / 2 off the diagonal, `diagonal` (0 if null) on
// it. `adjoint` is overwritten.
template <class S>
void weigh_columns(int n, const GapRule& rule, const Real<S>* w, const Real<S>* diagonal, S* m, S* adjoint) {
  using T = Real<S>;
  constexpr int parts = kComplex<S> ? 2 : 1;
  const int64_t size = static_cast<int64_t>(n) * n;
  T largest_value = 0, largest_part = 0;
  for (int i = 0; i < n; ++i) largest_value = std::max(largest_value, std::abs(w[i]));
  auto* flat = reinterpret_cast<T*>(m);
  for (int64_t i = 0; i < size * parts; ++i) largest_part = std::max(largest_part, std::abs(flat[i]));
  // Gaps and cotangents in units of powers of two near the largest: no square over- or underflows harmfully.
  const PowerOfTwo<T> unit = power_of_two<T>(splat(largest_value)), scale = power_of_two<T>(splat(largest_part));
  const T down = unit.down[0], half = T(0.5) * down, up = scale.up[0];
  for (int64_t i = 0; i < size * parts; ++i) flat[i] *= scale.down[0];
  T longest = 0;  // column of M, squared
  for (int j = 0; j < n; ++j) {
    T sum = 0;
    for (int64_t i = j * int64_t{n}; i < (j + 1) * int64_t{n}; ++i) sum += squared(m[i]);
    longest = std::max(longest, sum);
  }
  for (int jb = 0; jb < n; jb += kBlock)
    for (int ib = 0; ib < n; ib += kBlock)
      for (int j = jb; j < std::min(jb + kBlock, n); ++j)
        for (int i = ib; i < std::min(ib + kBlock, n); ++i)
          adjoint[static_cast<int64_t>(j) * n + i] = conjugate(m[static_cast<int64_t>(i) * n + j]);

  const T floor = largest_value * down * static_cast<T>(rule.gap_floor), floor_square = floor * floor;
  const int64_t mode = rule.mode;
  const T kappa = static_cast<T>(rule.noise_kappa) * std::numeric_limits<T>::epsilon();
  const T limit = mode == kAuto ? kappa * kappa * longest : T(-1);
  for (int j = 0; j < n; ++j) {
    S *column = m + static_cast<int64_t>(j) * n, *other = adjoint + static_cast<int64_t>(j) * n;
    const T wj = w[j] * down;
    for (int i = 0; i < n; ++i) {
      const T gap = wj - w[i] * down, square = gap * gap;
      // The smallest number keeps 0/0 away: an implicit floor of its root, far below any gap that rounding leaves.
      T factor = gap / std::max(mode == kMask ? square : square + floor_square, std::numeric_limits<T>::min());
      if (mode == kMask) factor = std::abs(gap) > floor ? factor : T(0);
      if (mode == kRaw) factor = 1 / gap;
      const S numerator = column[i] - other[i];
      if (squared(numerator) <= limit) factor = 0;
      other[i] = numerator * (factor * half) * up;
    }
    other[j] = diagonal ? S(diagonal[j]) : S(0);
  }
  std::copy_n(adjoint, size, m);
}

template <class S>
void backward_large(const Real<S>* values, const S* rows, const Real<S>* grad_values, const S* grad_rows,
                    int64_t batch, int n, const GapRule& rule, S* grad_matrices) {
  const int64_t size = static_cast<int64_t>(n) * n;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> v(size), m(size), half(size);
    for (int64_t item = begin; item < end; ++item) {
      const Real<S>*w = values + item * n, *grad_w = grad_values ? grad_values + item * n : nullptr;
      S* out = grad_matrices + item * size;
      if (std::isnan(w[0])) {
        fill_nan(out, size);
        continue;
      }
      std::copy_n(rows + item * size, size, v.get());  // by columns: V
      if (grad_rows) {
        std::copy_n(grad_rows + item * size, size, half.get());
        for (int j = 0; j < n; ++j) fix_phase(v + j * int64_t{n}, n, half + j * int64_t{n});
        multiply('C', 'N', n, n, n, v.get(), n, half.get(), n, m.get(), n);  // M = V^H gV
        weigh_columns(n, rule, w, grad_w, m.get(), half.get());
        multiply('N', 'N', n, n, n, v.get(), n, m.get(), n, half.get(), n);  // V S
      } else {
        for (int j = 0; j < n; ++j)
          for (int i = 0; i < n; ++i) half[j * int64_t{n} + i] = v[j * int64_t{n} + i] * grad_w[j];
      }
      multiply_hermitian(n, n, half.get(), n, v.get(), n, m.get(), n);  // (V S) V^H
      write_hermitian(n, m.get(), out);
    }
  });
}

}  // namespace stablekern
