// What a call of conjugate gradients gives to each thread, whatever form the matrix has.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "stablekern/complex_simd.h"
#include "stablekern/tensor.h"

namespace stablekern {

// b, x0 and x are (matrices, columns, n): so many systems for each matrix.
template <class S>
struct CgCall {
  using Tensor = torch::stable::Tensor;
  using T = RealOf<S>;

  const S* b;
  const S* x0;      // or null
  const S* blocks;  // (c, s, s) for each matrix, of the preconditioner, or null
  const T *rtol, *atol;
  int64_t n, systems, columns;
  int64_t block, block_count;    // s, and elements for each matrix
  int64_t each_rtol, each_atol;  // 1 if there is one for each system, else 0
  int64_t maxiter;
  T asymmetry;
  S* x;
  int32_t *info, *iterations;
  T* residual;

  CgCall(const Tensor& b, const std::optional<Tensor>& x0, const std::optional<Tensor>& blocks, const Tensor& rtol,
         const Tensor& atol, int64_t maxiter, double asymmetry, Tensor& x, Tensor& info, Tensor& iterations,
         Tensor& residual)
      : b(data<S>(b)),
        x0(data<S>(x0)),
        blocks(data<S>(blocks)),
        rtol(data<T>(rtol)),
        atol(data<T>(atol)),
        n(b.size(2)),
        systems(b.size(0) * b.size(1)),
        columns(b.size(1)),
        block(blocks ? blocks->size(2) : 0),
        block_count(blocks ? blocks->size(1) * block * block : 0),
        each_rtol(rtol.numel() > 1),
        each_atol(atol.numel() > 1),
        maxiter(maxiter),
        asymmetry(static_cast<T>(asymmetry)),
        x(mutable_data<S>(x)),
        info(mutable_data<int32_t>(info)),
        iterations(mutable_data<int32_t>(iterations)),
        residual(mutable_data<T>(residual)) {}
};

}  // namespace stablekern
