// LAPACK and BLAS out of the libraries that torch's CPU library brings, one matrix per thread.
//
// The symbols are looked up when the kernels are loaded, not linked: a torch that exports none still loads them, and
// `lapack_found` is what the launchers ask. LAPACK is given row-major matrices as they are. It reads columns, so it sees
// the transpose of A, that is conj(A), with the triangles exchanged; the eigenvectors it writes, one after the other,
// are the conjugates of A's, and are conjugated again.
//
// Everything is computed in memory of the thread's own, aligned to cache lines: libraries choose their code by
// alignment, and no result may depend on where in a batch a matrix lies.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "stablekern/complex_simd.h"
#include "stablekern/simd.h"

namespace stablekern {

template <class S>
using Real = RealOf<S>;
template <class S>
constexpr bool kComplex = kIsComplex<S>;

template <class S>
SK_INLINE S conjugate(S z) {
  if constexpr (kComplex<S>)
    return std::conj(z);
  else
    return z;
}
template <class S>
SK_INLINE Real<S> squared(S z) {
  if constexpr (kComplex<S>)
    return z.real() * z.real() + z.imag() * z.imag();
  else
    return z * z;
}

// `run(S{})` for the scalar type S of a tensor.
template <class Run>
void dispatch(const torch::stable::Tensor& tensor, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Double: return run(double{});
    case ScalarType::ComplexFloat: return run(std::complex<float>{});
    case ScalarType::ComplexDouble: return run(std::complex<double>{});
    default: STD_TORCH_CHECK(false, "float32, float64, complex64 or complex128 only");
  }
}

// ---- symbols -------------------------------------------------------------------------------------------------------

template <class S>
using Gemm = void (*)(const char* transa, const char* transb, const int* m, const int* n, const int* k, const S* alpha,
                      const S* a, const int* lda, const S* b, const int* ldb, const S* beta, S* c, const int* ldc);
template <class S>
using Syevd = void (*)(const char* jobz, const char* uplo, const int* n, S* a, const int* lda, S* w, S* work,
                       const int* lwork, int* iwork, const int* liwork, int* info);
template <class S>
using Heevd = void (*)(const char* jobz, const char* uplo, const int* n, S* a, const int* lda, Real<S>* w, S* work,
                       const int* lwork, Real<S>* rwork, const int* lrwork, int* iwork, const int* liwork, int* info);

template <class S>
using Potrf = void (*)(const char* uplo, const int* n, S* a, const int* lda, int* info);
template <class S>
using Trsm = void (*)(const char* side, const char* uplo, const char* transa, const char* diag, const int* m,
                      const int* n, const S* alpha, const S* a, const int* lda, S* b, const int* ldb);

template <class S>
struct Lapack {
  std::conditional_t<kComplex<S>, Heevd<S>, Syevd<S>> eigh = nullptr;
  Gemm<S> gemm = nullptr;
  Potrf<S> cholesky = nullptr;
  Trsm<S> triangular = nullptr;

  static const Lapack& get() {
    static const Lapack found = [] {
      constexpr bool wide = std::is_same_v<Real<S>, double>;
      constexpr const char* solver = kComplex<S> ? (wide ? "zheevd_" : "cheevd_") : (wide ? "dsyevd_" : "ssyevd_");
      constexpr const char* product = kComplex<S> ? (wide ? "zgemm_" : "cgemm_") : (wide ? "dgemm_" : "sgemm_");
      constexpr const char* factors = kComplex<S> ? (wide ? "zpotrf_" : "cpotrf_") : (wide ? "dpotrf_" : "spotrf_");
      constexpr const char* divides = kComplex<S> ? (wide ? "ztrsm_" : "ctrsm_") : (wide ? "dtrsm_" : "strsm_");
      Lapack result;
      result.eigh = reinterpret_cast<decltype(result.eigh)>(dlsym(RTLD_DEFAULT, solver));
      result.gemm = reinterpret_cast<Gemm<S>>(dlsym(RTLD_DEFAULT, product));
      result.cholesky = reinterpret_cast<Potrf<S>>(dlsym(RTLD_DEFAULT, factors));
      result.triangular = reinterpret_cast<Trsm<S>>(dlsym(RTLD_DEFAULT, divides));
      return result;
    }();
    return found;
  }
};

template <class S>
bool lapack_complete() {
  const Lapack<S>& found = Lapack<S>::get();
  return found.eigh && found.gemm && found.cholesky && found.triangular;
}
inline bool lapack_found() {
  return lapack_complete<float>() && lapack_complete<double>() && lapack_complete<std::complex<float>>() &&
         lapack_complete<std::complex<double>>();
}

// Holds the library's own threads at one in this thread: the matrices are what runs in parallel.
class OneThread {
 public:
  OneThread() : previous_(setter() ? setter()(1) : 0) {}
  ~OneThread() {
    if (setter()) setter()(previous_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  using Setter = int (*)(int);  // returns what held before
  static Setter setter() {
    static const Setter found = [] {
      void* symbol = dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local");
      return reinterpret_cast<Setter>(symbol ? symbol : dlsym(RTLD_DEFAULT, "openblas_set_num_threads_local"));
    }();
    return found;
  }
  int previous_;
};

// ---- memory --------------------------------------------------------------------------------------------------------

// Memory for one call in one thread, aligned to cache lines, that is only written by who asked for it.
template <class S>
class Buffer {
 public:
  explicit Buffer(std::size_t length)
      : memory_(static_cast<S*>(::operator new[](std::max<std::size_t>(length, 1) * sizeof(S), std::align_val_t{64}))) {
  }
  operator S*() const { return memory_.get(); }
  S* get() const { return memory_.get(); }

 private:
  struct Release {
    void operator()(S* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<S[], Release> memory_;
};

constexpr int kBlock = 16;  // of blocked transposes: a few cache lines each way

// ---- products ------------------------------------------------------------------------------------------------------

// c (m x n) = op(a) op(b), columns lda, ldb, ldc apart; 'N', 'T' or 'C' (conjugate transpose).
template <class S>
void multiply(char transa, char transb, int m, int n, int k, const S* a, int lda, const S* b, int ldb, S* c, int ldc) {
  const S one(1), zero(0);
  Lapack<S>::get().gemm(&transa, &transb, &m, &n, &k, &one, a, &lda, b, &ldb, &zero, c, &ldc);
}

// The lower triangle, at least, of the n x n Hermitian c = a b^H, a and b n x k: the rest of it is left open.
template <class S>
void multiply_hermitian(int n, int k, const S* a, int lda, const S* b, int ldb, S* c, int ldc) {
  const int width = n <= 64 ? n : (n + 3) / 4;
  for (int j = 0; j < n; j += width) {
    const auto at = static_cast<std::ptrdiff_t>(j);
    multiply('N', 'C', n - j, std::min(width, n - j), k, a + at, lda, b + at, ldb, c + at * ldc + at, ldc);
  }
}

// The Hermitian matrix whose lower triangle, by columns, is given, to both triangles of `out`, by rows.
template <class S>
void write_hermitian(int n, const S* columns, S* out) {
  for (int jb = 0; jb < n; jb += kBlock) {
    for (int ib = jb; ib < n; ib += kBlock) {
      for (int j = jb; j < std::min(jb + kBlock, n); ++j) {
        for (int i = std::max(ib, j); i < std::min(ib + kBlock, n); ++i) {
          const S value = columns[static_cast<std::ptrdiff_t>(j) * n + i];
          out[static_cast<std::ptrdiff_t>(i) * n + j] = value;
          out[static_cast<std::ptrdiff_t>(j) * n + i] = conjugate(value);
        }
      }
    }
    if constexpr (kComplex<S>)
      for (int j = jb; j < std::min(jb + kBlock, n); ++j)
        out[static_cast<std::ptrdiff_t>(j) * n + j] = out[static_cast<std::ptrdiff_t>(j) * n + j].real();
  }
}

// (G + G^H) / 2 of a matrix given by rows; by columns.
template <class S>
void read_hermitian_part(int n, const S* rows, S* columns) {
  const Real<S> half(0.5);
  for (int jb = 0; jb < n; jb += kBlock)
    for (int ib = jb; ib < n; ib += kBlock)
      for (int j = jb; j < std::min(jb + kBlock, n); ++j)
        for (int i = std::max(ib, j); i < std::min(ib + kBlock, n); ++i) {
          const auto below = static_cast<std::ptrdiff_t>(i) * n + j, above = static_cast<std::ptrdiff_t>(j) * n + i;
          const S value = rows[below] * half + conjugate(rows[above]) * half;
          columns[above] = value;
          columns[below] = conjugate(value);
        }
}

template <class S>
bool all_finite(const S* data, int64_t length) {
  const auto* x = reinterpret_cast<const Real<S>*>(data);
  const int64_t count = length * (kComplex<S> ? 2 : 1);
  Real<S> probe[8] = {};  // NaN once an entry is not finite
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int lane = 0; lane < 8; ++lane) probe[lane] += x[i + lane] * Real<S>(0);
  for (; i < count; ++i) probe[0] += x[i] * Real<S>(0);
  for (int lane = 1; lane < 8; ++lane) probe[0] += probe[lane];
  return probe[0] == 0;
}

// ---- one eigenproblem ----------------------------------------------------------------------------------------------

// Solves one (n, n) Hermitian problem after the other; what it allocates is kept from one to the next.
template <class S>
class HermitianSolver {
 public:
  using T = Real<S>;

  static constexpr char kVectors = 'V';

  explicit HermitianSolver(int n)
      : n_(n), sizes_(query()), matrix(size(n) * n), values(n), work_(sizes_.work),
        real_work_(sizes_.real), integer_work_(sizes_.integer) {}

  // `info` of the matrix given by rows: the bits of `eigh_ex`. Where it is 0, `values` ascend and column j of
  // `matrix` is eigenvector j, of no particular sign or phase.
  int32_t solve(const S* rows, bool upper) {
    const int64_t length = static_cast<int64_t>(n_) * n_;
    if (!all_finite(rows, length)) return kNonFiniteMatrix;
    std::memcpy(matrix.get(), rows, static_cast<std::size_t>(length) * sizeof(S));
    const char triangle = upper ? 'L' : 'U';  // of the transpose
    const int work = static_cast<int>(sizes_.work), real = static_cast<int>(sizes_.real);
    const int integer = static_cast<int>(sizes_.integer);
    int info = 0;
    if constexpr (kComplex<S>)
      Lapack<S>::get().eigh(&kVectors, &triangle, &n_, matrix, &n_, values, work_, &work, real_work_, &real, integer_work_,
                            &integer, &info);
    else
      Lapack<S>::get().eigh(&kVectors, &triangle, &n_, matrix, &n_, values, work_, &work, integer_work_, &integer, &info);
    if (info != 0) return kUnconverged;
    if constexpr (kComplex<S>)
      for (int64_t i = 0; i < length; ++i) matrix[i] = std::conj(matrix[i]);
    return 0;
  }

  // Memory of `length` for the caller, which the next `solve` leaves alone.
  S* spare(int64_t length) {
    if (spare_length_ < length) {
      spare_ = Buffer<S>(static_cast<std::size_t>(length));
      spare_length_ = length;
    }
    return spare_;
  }

 private:
  static constexpr int32_t kUnconverged = 1, kNonFiniteMatrix = 2;

  struct Sizes {
    std::size_t work, real, integer;
  };
  static std::size_t size(int n) { return static_cast<std::size_t>(n); }

  Sizes query() const {
    const int ask = -1;
    const char triangle = 'U';
    S work{}, none{};
    T real{}, values{};
    int integer = 0, info = 0;
    if constexpr (kComplex<S>)
      Lapack<S>::get().eigh(&kVectors, &triangle, &n_, &none, &n_, &values, &work, &ask, &real, &ask, &integer, &ask,
                            &info);
    else
      Lapack<S>::get().eigh(&kVectors, &triangle, &n_, &none, &n_, &values, &work, &ask, &integer, &ask, &info);
    // Sizes come as floating point numbers, which may have been rounded down: never below what is documented.
    const std::size_t n = size(n_);
    const std::size_t least = kComplex<S> ? 2 * n + n * n : 1 + 6 * n + 2 * n * n;
    return {std::max(least, static_cast<std::size_t>(std::real(work))),
            kComplex<S> ? std::max(1 + 5 * n + 2 * n * n, static_cast<std::size_t>(real)) : 1,
            std::max(3 + 5 * n, static_cast<std::size_t>(integer))};
  }

  int n_;
  Sizes sizes_;

 public:
  Buffer<S> matrix;
  Buffer<T> values;

 private:
  Buffer<S> work_;
  Buffer<T> real_work_;
  Buffer<int> integer_work_;
  Buffer<S> spare_{0};
  int64_t spare_length_ = 0;
};

// `item(solver, i)` for each item of a batch, in parallel, one thread each.
template <class S, class Item>
void for_each_matrix(int64_t batch, int n, const Item& item) {
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    HermitianSolver<S> solver(n);
    for (int64_t i = begin; i < end; ++i) item(solver, i);
  });
}

}  // namespace stablekern
