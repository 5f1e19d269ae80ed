// The gated norm at the end of a Mamba-2 block, and the way back; formulas in stablekern/ops/gated_rms_norm.py.
//
// One row after the other, the lanes along its features: the gated values are written to the result, their squares summed,
// and the row scaled while it is still in the first cache. Backward reads y, z and the gradient and keeps nothing from the
// forward: the squares are summed again beside the product with the gradient. The gradient of the weight is summed per
// stretch of rows, whose length does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "stablekern/simd.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kTaskEntries = 1 << 15;  // rows of this many entries are worth a thread

template <class T>
struct Rows {
  int64_t count, width, groups;
  const T *y, *z;
  int64_t y_stride, z_stride;  // the features are dense
  const T* weight;
  T eps;

  int64_t part() const { return width / groups; }
};

template <class T>
Rows<T> describe(const Tensor& y, const Tensor& z, const Tensor& weight, double eps, int64_t groups) {
  return {y.size(0),
          y.size(1),
          groups,
          static_cast<const T*>(y.const_data_ptr()),
          static_cast<const T*>(z.const_data_ptr()),
          y.stride(0),
          z.stride(0),
          static_cast<const T*>(weight.const_data_ptr()),
          static_cast<T>(eps)};
}

// `step(k, width)` over the features of a part in whole vectors, the last one shorter.
template <class T, class Step>
SK_INLINE void along(int64_t begin, int64_t end, const Step& step) {
  int64_t k = begin;
  for (; k + kLanes<T> <= end; k += kLanes<T>) step(k, kLanes<T>);
  if (k < end) step(k, static_cast<int>(end - k));
}

template <class T>
SK_INLINE T inverse_rms(Vec<T> squares, int64_t part, T eps) {
  return 1 / std::sqrt(horizontal_sum(squares) / static_cast<T>(part) + eps);
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Rows<T>& p, T* out) {
  torch::stable::parallel_for(0, p.count, std::max<int64_t>(kTaskEntries / p.width, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *y = p.y + row * p.y_stride, *z = p.z + row * p.z_stride;
      T* to = out + row * p.width;
      for (int64_t first = 0; first < p.width; first += p.part()) {
        Vec<T> squares{};
        along<T>(first, first + p.part(), [&](int64_t k, int width) {
          const Vec<T> gate = load_first(z + k, width);
          const Vec<T> u = load_first(y + k, width) * (gate * sigmoid<T>(gate));
          squares = fma(u, u, squares);
          store_first(to + k, u, width);
        });
        const Vec<T> scale = splat(inverse_rms<T>(squares, p.part(), p.eps));
        along<T>(first, first + p.part(), [&](int64_t k, int width) {
          store_first(to + k, load_first(to + k, width) * scale * load_first(p.weight + k, width), width);
        });
      }
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct Adjoint {
  const T* grad;
  int64_t grad_stride;
  T *by_y, *by_z, *by_weight;  // by_weight: (tasks, width)
  int64_t rows_per_task;
};

template <class T>
void backward(const Rows<T>& p, const Adjoint<T>& adjoint) {
  const int64_t tasks = (p.count + adjoint.rows_per_task - 1) / adjoint.rows_per_task;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> opened(p.width);
    for (int64_t task = begin; task < end; ++task) {
      T* by_weight = adjoint.by_weight + task * p.width;
      std::fill_n(by_weight, p.width, T(0));
      const int64_t last = std::min(p.count, (task + 1) * adjoint.rows_per_task);
      for (int64_t row = task * adjoint.rows_per_task; row < last; ++row) {
        const T *y = p.y + row * p.y_stride, *z = p.z + row * p.z_stride, *g = adjoint.grad + row * adjoint.grad_stride;
        T *by_y = adjoint.by_y + row * p.width, *by_z = adjoint.by_z + row * p.width;
        for (int64_t first = 0; first < p.width; first += p.part()) {
          Vec<T> squares{}, along_u{};
          along<T>(first, first + p.part(), [&](int64_t k, int width) {
            const Vec<T> gate = load_first(z + k, width), share = sigmoid<T>(gate);
            const Vec<T> u = load_first(y + k, width) * (gate * share);
            squares = fma(u, u, squares);
            along_u = fma(load_first(g + k, width) * load_first(p.weight + k, width), u, along_u);
            store_first(opened.data() + k, share, width);
          });
          const T inverse = inverse_rms<T>(squares, p.part(), p.eps);
          // dL/du = r w g - u r^3 mean(w g u); r^2 apart, so that no cube overflows.
          const T pull = horizontal_sum(along_u) / static_cast<T>(p.part()) * inverse;
          const Vec<T> r = splat(inverse), back = splat(pull), one = splat<T>(1);
          along<T>(first, first + p.part(), [&](int64_t k, int width) {
            const Vec<T> gate = load_first(z + k, width), share = load_first(opened.data() + k, width);
            const Vec<T> passed = gate * share, from_y = load_first(y + k, width), given = load_first(g + k, width);
            const Vec<T> normal = from_y * passed * r;
            const Vec<T> by_u = r * fnma(normal, back, given * load_first(p.weight + k, width));
            store_first(by_y + k, by_u * passed, width);
            store_first(by_z + k, by_u * from_y * fma(passed, one - share, share), width);
            store_first(by_weight + k, fma(given, normal, load_first(by_weight + k, width)), width);
          });
        }
      }
    }
  });
}

// ---- entry --------------------------------------------------------------------------------------------------------

void gated_rms_norm_fwd(Tensor y, Tensor z, Tensor weight, double eps, int64_t groups, Tensor out) {
  if (y.numel() == 0) return;
  const auto run = [&]<class T>(T) {
    forward<T>(describe<T>(y, z, weight, eps, groups), static_cast<T*>(out.mutable_data_ptr()));
  };
  y.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

void gated_rms_norm_bwd(Tensor grad, Tensor y, Tensor z, Tensor weight, double eps, int64_t groups, int64_t rows_per_task,
                        Tensor by_y, Tensor by_z, Tensor by_weight) {
  if (y.numel() == 0) return;
  const auto run = [&]<class T>(T) {
    backward<T>(describe<T>(y, z, weight, eps, groups),
                {static_cast<const T*>(grad.const_data_ptr()), grad.stride(0), static_cast<T*>(by_y.mutable_data_ptr()),
                 static_cast<T*>(by_z.mutable_data_ptr()), static_cast<T*>(by_weight.mutable_data_ptr()), rows_per_task});
  };
  y.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("gated_rms_norm_fwd(Tensor y, Tensor z, Tensor weight, float eps, int groups, Tensor(a!) out) -> ()");
  m.def(
      "gated_rms_norm_bwd(Tensor grad, Tensor y, Tensor z, Tensor weight, float eps, int groups, int rows_per_task,"
      " Tensor(a!) by_y, Tensor(b!) by_z, Tensor(c!) by_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&stablekern::gated_rms_norm_fwd));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&stablekern::gated_rms_norm_bwd));
}
