// Cholesky factors with the least shift that lets each matrix factor, and solutions with them, one matrix per thread.
//
// A factor is U with H = U^H U, by rows. LAPACK, which reads columns, sees M = U^T in it, H^T = M M^H, and right-hand
// sides by rows are its A^T: X^T = A^T M^-H M^-1 is two triangular solves from the right, with nothing transposed.
#include "stablekern/lapack.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int32_t kShifted = 1, kNonFinite = 2, kIndefinite = 4;

// The upper triangle of (R + R^H) / 2 by rows, zeros below it, and its trace.
template <class S>
Real<S> read_upper(int n, const S* rows, S* upper) {
  const Real<S> half(0.5);
  for (int ib = 0; ib < n; ib += kBlock)
    for (int jb = 0; jb < n; jb += kBlock)
      for (int i = ib; i < std::min(ib + kBlock, n); ++i)
        for (int j = jb; j < std::min(jb + kBlock, n); ++j) {
          const auto here = static_cast<int64_t>(i) * n + j, there = static_cast<int64_t>(j) * n + i;
          upper[here] = j < i ? S(0) : rows[here] * half + conjugate(rows[there]) * half;
        }
  Real<S> trace = 0;
  for (int i = 0; i < n; ++i) trace += std::real(upper[static_cast<int64_t>(i) * (n + 1)]);
  return trace;
}

// Whatever is not finite in a row ends on the diagonal.
template <class S>
bool factored(int n, S* upper) {
  if (n == 0) return true;  // LAPACK wants a leading dimension of 1 or more
  const char triangle = 'L';  // of the transpose
  int info = 0;
  Lapack<S>::get().cholesky(&triangle, &n, upper, &n, &info);
  bool finite = info == 0;
  for (int i = 0; i < n; ++i) finite = finite && std::isfinite(std::real(upper[static_cast<int64_t>(i) * (n + 1)]));
  return finite;
}

template <class S>
void factor(const S* matrices, int64_t batch, int n, const Real<S>* shifts, int64_t count, S* factors, int32_t* info,
            Real<S>* jitter) {
  const int64_t size = static_cast<int64_t>(n) * n;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> upper(static_cast<std::size_t>(size));
    for (int64_t item = begin; item < end; ++item) {
      const S* rows = matrices + item * size;
      const Real<S> trace = read_upper<S>(n, rows, upper);
      jitter[item] = 0;
      bool done = factored<S>(n, upper);
      for (int64_t level = 0; level < count && !done; ++level) {
        read_upper<S>(n, rows, upper);
        jitter[item] = shifts[level] * trace;
        for (int i = 0; i < n; ++i) upper[static_cast<int64_t>(i) * (n + 1)] += jitter[item];
        done = factored<S>(n, upper);
      }
      info[item] = jitter[item] > 0 ? kShifted : 0;
      if (!done) {
        info[item] = all_finite(rows, size) ? kIndefinite : kNonFinite;
        jitter[item] = 0;
        std::fill_n(upper.get(), size, S(0));
        for (int i = 0; i < n; ++i) upper[static_cast<int64_t>(i) * (n + 1)] = S(1);
      }
      std::copy_n(upper.get(), size, factors + item * size);
    }
  });
}

// The factor, or its conjugate transpose, divided out of each row of the (q, n) transposed right-hand sides.
template <class S>
void divide(char trans, int n, int q, const S* upper, S* sides) {
  const char side = 'R', triangle = 'L', diagonal = 'N';
  const S one(1);
  Lapack<S>::get().triangular(&side, &triangle, &trans, &diagonal, &q, &n, &one, upper, &n, sides, &q);
}

template <class S>
void solve(const S* factors, const S* sides, int64_t batch, int n, int q, bool half, S* solutions) {
  const int64_t size = static_cast<int64_t>(n) * n, length = static_cast<int64_t>(n) * q;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> upper(static_cast<std::size_t>(size)), x(static_cast<std::size_t>(length));
    for (int64_t item = begin; item < end; ++item) {
      std::copy_n(factors + item * size, size, upper.get());
      std::copy_n(sides + item * length, length, x.get());
      divide<S>('C', n, q, upper, x);
      if (!half) divide<S>('N', n, q, upper, x);
      std::copy_n(x.get(), length, solutions + item * length);
    }
  });
}

void cholesky_fwd(Tensor R, Tensor shifts, Tensor factors, Tensor info, Tensor jitter) {
  dispatch(R, [&]<class S>(S) {
    factor(static_cast<const S*>(R.const_data_ptr()), R.size(0), static_cast<int>(R.size(1)),
           static_cast<const Real<S>*>(shifts.const_data_ptr()), shifts.size(0),
           static_cast<S*>(factors.mutable_data_ptr()), static_cast<int32_t*>(info.mutable_data_ptr()),
           static_cast<Real<S>*>(jitter.mutable_data_ptr()));
  });
}

void cholesky_solve(Tensor factors, Tensor A, bool half, Tensor X) {
  const int64_t batch = A.size(0), n = A.size(1), q = A.size(2);
  if (n == 0 || q == 0) return;
  dispatch(A, [&]<class S>(S) {
    solve(static_cast<const S*>(factors.const_data_ptr()), static_cast<const S*>(A.const_data_ptr()), batch,
          static_cast<int>(n), static_cast<int>(q), half, static_cast<S*>(X.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("cholesky_fwd(Tensor R, Tensor shifts, Tensor(a!) factors, Tensor(b!) info, Tensor(c!) jitter) -> ()");
  m.def("cholesky_solve(Tensor factors, Tensor A, bool half, Tensor(a!) X) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("cholesky_fwd", TORCH_BOX(&stablekern::cholesky_fwd));
  m.impl("cholesky_solve", TORCH_BOX(&stablekern::cholesky_solve));
}
