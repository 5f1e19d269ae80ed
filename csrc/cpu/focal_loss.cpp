// Focal loss: loss and, in the same pass, its derivatives. One exponential and one logarithm give softplus(x),
// softplus(-x), p and 1 - p, so the derivatives cost a few multiplications more; keeping them makes the backward one
// product. The results leave past the caches when they are larger than those.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "stablekern/simd.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 8192;                 // elements that are worth a thread
constexpr int64_t kStreamBytes = 2 * 1024 * 1024;  // larger than a core's L2: the results would only displace the inputs

enum class Gamma { kZero, kOne, kTwo, kAny };

template <class T>
struct Params {
  const T* logits;
  const T* targets;
  T* loss;
  T* by_logits;   // null: not wanted
  T* by_targets;  // null: not wanted
  T positive, negative, gamma;  // pos_weight * alpha, 1 - alpha
};

// base^gamma for base = exp(-softplus).
template <class T, Gamma kGamma>
SK_INLINE Vec<T> power(Vec<T> base, Vec<T> softplus, T gamma) {
  if constexpr (kGamma == Gamma::kZero)
    return splat<T>(1);
  else if constexpr (kGamma == Gamma::kOne)
    return base;
  else if constexpr (kGamma == Gamma::kTwo)
    return base * base;
  else
    return exp<T>(softplus * splat<T>(-gamma));
}

// weight * softplus, 0 where the weight has underflowed: the limit for an infinite logit.
template <class T>
SK_INLINE Vec<T> vanishing(Vec<T> weight, Vec<T> softplus) {
  return select<T>(equal(weight, Vec<T>{}), Vec<T>{}, weight * softplus);
}

template <class T>
struct Results {
  Vec<T> loss, by_logits, by_targets;
};

template <class T, Gamma kGamma>
SK_INLINE Results<T> evaluate(Vec<T> x, Vec<T> y, const Params<T>& params) {
  const Vec<T> zero{}, one = splat<T>(1);
  const Vec<T> e = exp<T>(-abs(x));
  const Vec<T> tail = log1p_unit<T>(e);
  const Vec<T> up = max(zero, x) + tail, down = max(zero, -x) + tail;
  const Vec<T> near = one / (one + e), far = e * near;
  const auto right = greater_equal(x, zero);
  const Vec<T> p = select<T>(right, near, far), q = select<T>(right, far, near);
  const Vec<T> positive = splat<T>(params.positive) * power<T, kGamma>(q, up, params.gamma);
  const Vec<T> negative = splat<T>(params.negative) * power<T, kGamma>(p, down, params.gamma);
  const Vec<T> gamma = splat<T>(params.gamma), off = one - y;
  const Vec<T> toward_one = y * positive * fma(gamma, vanishing<T>(p, down), q);
  const Vec<T> toward_zero = off * negative * fma(gamma, vanishing<T>(q, up), p);
  return {vanishing<T>(y * positive, down) + vanishing<T>(off * negative, up), toward_zero - toward_one,
          vanishing<T>(positive, down) - vanishing<T>(negative, up)};
}

template <class T, Gamma kGamma>
void run(const Params<T>& params, int64_t n, bool streaming) {
  constexpr int lanes = kLanes<T>;
  const auto put = [streaming](T* base, int64_t at, Vec<T> v) {
    if (base == nullptr) return;
    if (streaming)
      stream<T>(base + at, v);
    else
      store<T>(base + at, v);
  };
  // Threads get whole vectors, so streamed stores stay aligned.
  const int64_t vectors = (n + lanes - 1) / lanes;
  torch::stable::parallel_for(0, vectors, kGrain / lanes, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t at = v * lanes;
      if (at + lanes <= n) {
        const Results<T> r = evaluate<T, kGamma>(load(params.logits + at), load(params.targets + at), params);
        put(params.loss, at, r.loss);
        put(params.by_logits, at, r.by_logits);
        put(params.by_targets, at, r.by_targets);
      } else {
        const int rest = static_cast<int>(n - at);
        const Results<T> r = evaluate<T, kGamma>(load_first(params.logits + at, rest), load_first(params.targets + at, rest), params);
        store_first(params.loss + at, r.loss, rest);
        if (params.by_logits != nullptr) store_first(params.by_logits + at, r.by_logits, rest);
        if (params.by_targets != nullptr) store_first(params.by_targets + at, r.by_targets, rest);
      }
    }
  });
}

template <class T>
void launch(const Tensor& logits, const Tensor& targets, double alpha, double gamma, double pos_weight, Tensor& loss,
            Tensor& by_logits, Tensor& by_targets) {
  const int64_t n = logits.numel();
  const auto wanted = [](Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
  const Params<T> params{static_cast<const T*>(logits.const_data_ptr()),
                         static_cast<const T*>(targets.const_data_ptr()),
                         static_cast<T*>(loss.mutable_data_ptr()),
                         wanted(by_logits),
                         wanted(by_targets),
                         static_cast<T>(pos_weight * alpha),
                         static_cast<T>(1 - alpha),
                         static_cast<T>(gamma)};
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; };
  const bool streaming = n * static_cast<int64_t>(sizeof(T)) > kStreamBytes && aligned(params.loss) &&
                         aligned(params.by_logits) && aligned(params.by_targets);
  if (gamma == 0)
    run<T, Gamma::kZero>(params, n, streaming);
  else if (gamma == 1)
    run<T, Gamma::kOne>(params, n, streaming);
  else if (gamma == 2)
    run<T, Gamma::kTwo>(params, n, streaming);
  else
    run<T, Gamma::kAny>(params, n, streaming);
}

void focal_loss_fwd(Tensor logits, Tensor targets, double alpha, double gamma, double pos_weight, Tensor loss,
                    Tensor by_logits, Tensor by_targets) {
  if (logits.scalar_type() == torch::headeronly::ScalarType::Float)
    launch<float>(logits, targets, alpha, gamma, pos_weight, loss, by_logits, by_targets);
  else
    launch<double>(logits, targets, alpha, gamma, pos_weight, loss, by_logits, by_targets);
}

template <class T>
void product(const Tensor& grad, const Tensor& slope, Tensor& out) {
  constexpr int lanes = kLanes<T>;
  const int64_t n = slope.numel();
  const auto* g = static_cast<const T*>(grad.const_data_ptr());
  const auto* s = static_cast<const T*>(slope.const_data_ptr());
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  const bool streaming =
      n * static_cast<int64_t>(sizeof(T)) > kStreamBytes && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
  torch::stable::parallel_for(0, (n + lanes - 1) / lanes, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t at = v * lanes;
      if (at + lanes > n) {
        const int rest = static_cast<int>(n - at);
        store_first(to + at, load_first(g + at, rest) * load_first(s + at, rest), rest);
      } else if (streaming) {
        stream<T>(to + at, load(g + at) * load(s + at));
      } else {
        store<T>(to + at, load(g + at) * load(s + at));
      }
    }
  });
}

void focal_loss_bwd(Tensor grad, Tensor slope, Tensor out) {
  if (slope.scalar_type() == torch::headeronly::ScalarType::Float)
    product<float>(grad, slope, out);
  else
    product<double>(grad, slope, out);
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "focal_loss_fwd(Tensor logits, Tensor targets, float alpha, float gamma, float pos_weight, Tensor(a!) loss,"
      " Tensor(b!) by_logits, Tensor(c!) by_targets) -> ()");
  m.def("focal_loss_bwd(Tensor grad, Tensor slope, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("focal_loss_fwd", TORCH_BOX(&stablekern::focal_loss_fwd));
  m.impl("focal_loss_bwd", TORCH_BOX(&stablekern::focal_loss_bwd));
}
