// Conjugate gradients for sparse systems with one pattern, a whole solve at a time, a system in each lane (cg_lanes.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>

#include "stablekern/cg_call.h"
#include "stablekern/cg_lanes.h"
#include "stablekern/krylov.h"
#include "stablekern/lanes.h"
#include "stablekern/lapack.h"
#include "stablekern/tensor.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRowsPerTask = 64;

template <class S>
struct SparseCall : CgCall<S> {
  Pattern pattern;
  const S* values;
};

// One system for each lane, at its offset in `from`; lanes beyond `lanes` are 0.
template <class S>
void fill_lanes(const S* from, const int64_t* offsets, int lanes, int64_t count, Element<S>* to) {
  std::fill_n(to, count, Element<S>{});
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t i = 0; i < count; ++i) set_lane<S>(to, i, lane, from[offsets[lane] + i]);
}

template <class S, int kMethod>
SK_NOINLINE void solve_group(const SparseCall<S>& call, int64_t first, const LaneRoom<S>& room) {
  using T = RealOf<S>;
  constexpr int L = kLanes<T>;
  const Pattern& pattern = call.pattern;
  const int lanes = static_cast<int>(std::min<int64_t>(L, call.systems - first));
  const auto offsets = [&](int64_t size, int64_t divisor) {
    std::array<int64_t, L> at{};
    for (int lane = 0; lane < lanes; ++lane) at[lane] = (first + lane) / divisor * size;
    return at;
  };
  const auto vectors = offsets(pattern.n, 1);
  fill_lanes<S>(call.values, offsets(pattern.nnz, call.columns).data(), lanes, pattern.nnz, room.values);
  fill_lanes<S>(call.b, vectors.data(), lanes, pattern.n, room.b);
  LaneSolver<S, kMethod> solver{pattern, room, call.block, {}, {}, 0, call.asymmetry, {}, {}, {}};
  using Integer = typename VecTypes<T>::integer;
  solver.maxiter = static_cast<Integer>(std::min<int64_t>(call.maxiter, std::numeric_limits<Integer>::max()));
  for (int lane = 0; lane < lanes; ++lane) {
    solver.rtol[lane] = call.rtol[(first + lane) * call.each_rtol];
    solver.atol[lane] = call.atol[(first + lane) * call.each_atol];
  }
  Vec<T> probe{}, size{}, side_probe{};
  for (int64_t t = 0; t < pattern.nnz; ++t) {
    size = max(part_size(room.values[t]), size);
    probe = probe_finite(room.values[t], probe);
  }
  const IVec<T> exponent = lane_exponents<T>(size);
  const Vec<T> length = solver.largest(room.b, side_probe);
  const IVec<T> scale = lane_exponents<T>(length), into = exponent - scale;
  // What is not finite is passed over by `largest`, but not by its probe.
  const Mask<T> zero = equal(length + side_probe, Vec<T>{});
  for (int64_t t = 0; t < pattern.nnz; ++t) room.values[t] = lane_scaled<T>(room.values[t], -exponent);
  for (int64_t i = 0; i < pattern.n; ++i) room.b[i] = lane_scaled<T>(room.b[i], -scale);
  solver.atol = lane_scaled<T>(solver.atol, -scale);
  if (call.block > 0) {
    fill_lanes<S>(call.blocks, offsets(call.block_count, call.columns).data(), lanes, call.block_count, room.blocks);
    for (int64_t i = 0; i < call.block_count; ++i) room.blocks[i] = lane_scaled<T>(room.blocks[i], exponent);
  }
  std::fill_n(room.y, pattern.n, Element<S>{});
  if (call.x0 != nullptr) {
    fill_lanes<S>(call.x0, vectors.data(), lanes, pattern.n, room.y);
    for (int64_t i = 0; i < pattern.n; ++i) room.y[i] = lane_scaled<T>(room.y[i], into);
    solver.largest(room.y, probe);
  }
  const Mask<T> readable = equal(probe + side_probe, Vec<T>{});
  for (int64_t i = 0; i < pattern.n; ++i) room.y[i] = select(zero, Element<S>{}, room.y[i]);
  solver.run(call.x0 != nullptr, zero, select_int<T>(readable | zero, IVec<T>{}, IVec<T>{} + kNonFinite));
  solver.residual = lane_scaled<T>(solver.residual, scale);
  for (int64_t i = 0; i < pattern.n; ++i) room.y[i] = lane_scaled<T>(room.y[i], -into);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t at = first + lane;
    const bool failed = solver.info[lane] >= kNonFinite;
    call.info[at] = static_cast<int32_t>(solver.info[lane]);
    call.iterations[at] = static_cast<int32_t>(solver.iterations[lane]);
    call.residual[at] = failed ? nan : solver.residual[lane];
    for (int64_t i = 0; i < pattern.n; ++i)
      call.x[at * pattern.n + i] = failed ? S(nan) : get_lane<S>(room.y, i, lane);
  }
}

void cg_csr_fwd(Tensor crow, Tensor col, Tensor values, Tensor b, std::optional<Tensor> x0,
                std::optional<Tensor> blocks, Tensor rtol, Tensor atol, int64_t maxiter, int64_t method,
                double asymmetry, Tensor x, Tensor info, Tensor iterations, Tensor residual) {
  dispatch(b, [&]<class S>(S) {
    constexpr int L = kLanes<RealOf<S>>;
    const SparseCall<S> call{{b, x0, blocks, rtol, atol, maxiter, asymmetry, x, info, iterations, residual},
                             {data<int64_t>(crow), data<int64_t>(col), b.size(2), col.size(0)},
                             data<S>(values)};
    const int64_t nnz = call.pattern.nnz;
    const auto solve = [&] {
      if constexpr (kIsComplex<S>)
        if (method == kSymmetric) return solve_group<S, kSymmetric>;
      return method == kAny ? solve_group<S, kAny> : solve_group<S, kHermitian>;
    }();
    torch::stable::parallel_for(0, (call.systems + L - 1) / L, 1, [&](int64_t begin, int64_t end) {
      Arena arena;
      LaneRoom<S>::reserve(arena, call.n, nnz, call.block_count);
      arena.allocate();
      const LaneRoom<S> room(arena, call.n, nnz, call.block_count);
      for (int64_t group = begin; group < end; ++group) solve(call, group * L, room);
    });
  });
}

// The entries of the sum over k of -adjoint x^H that the pattern has.
void cg_csr_bwd(Tensor crow, Tensor col, Tensor adjoint, Tensor x, Tensor grad) {
  const int64_t batch = x.size(0), columns = x.size(1), n = x.size(2), nnz = col.size(0);
  const auto *starts = data<int64_t>(crow), *places = data<int64_t>(col);
  dispatch(x, [&]<class S>(S) {
    const S *l = data<S>(adjoint), *v = data<S>(x);
    S* out = mutable_data<S>(grad);
    torch::stable::parallel_for(0, batch * n, kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t item = at / n, i = at % n, first = item * columns * n;
        for (int64_t t = starts[i]; t < starts[i + 1]; ++t) {
          S sum(0);
          for (int64_t k = 0; k < columns; ++k) sum -= l[first + k * n + i] * conjugate(v[first + k * n + places[t]]);
          out[item * nnz + t] = sum;
        }
      }
    });
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "cg_csr_fwd(Tensor crow, Tensor col, Tensor values, Tensor b, Tensor? x0, Tensor? blocks, Tensor rtol, Tensor atol,"
      " int maxiter, int method, float asymmetry, Tensor(a!) x, Tensor(b!) info, Tensor(c!) iterations,"
      " Tensor(d!) residual) -> ()");
  m.def("cg_csr_bwd(Tensor crow, Tensor col, Tensor adjoint, Tensor x, Tensor(a!) grad_values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("cg_csr_fwd", TORCH_BOX(&stablekern::cg_csr_fwd));
  m.impl("cg_csr_bwd", TORCH_BOX(&stablekern::cg_csr_bwd));
}
