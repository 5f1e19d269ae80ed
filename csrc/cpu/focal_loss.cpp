// Focal loss: loss and, in the same pass, its derivatives. One exponential and one logarithm give softplus(x),
// softplus(-x), p and 1 - p, so the derivatives cost a few multiplications more; keeping them makes the backward one
// product. The results leave past the caches when they are larger than those. A mean or a sum stores no loss at all.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "stablekern/caches.h"
#include "stablekern/simd.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 8192;                 // elements that are worth a thread
constexpr int64_t kStreamBytes = 2 * 1024 * 1024;  // larger than a core's L2: the results would only displace the inputs

constexpr int64_t kAheadBytes = 2048;            // of the inputs are under way

enum class Gamma { kZero, kOne, kTwo, kAny };

template <class T>
struct Params {
  const T* logits;
  const T* targets;
  T* loss;        // null: its sum is wanted
  T* by_logits;   // null: not wanted
  T* by_targets;  // null: not wanted
  T positive, negative, gamma;  // pos_weight * alpha, 1 - alpha
  T scale;                      // of the derivatives
  bool may_be_hard;             // whether vectors of targets that are all 0 or 1 may go the short way
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

template <class T>
struct Shared {
  Vec<T> tail, near, far;  // log(1 + e), 1 / (1 + e), e / (1 + e) of e = exp(-|x|)
};

template <class T>
SK_INLINE Shared<T> shared(Vec<T> x) {
  const Vec<T> one = splat<T>(1), e = exp<T>(-abs(x)), near = reciprocal(one + e);
  return {log1p_unit<T>(e), near, e * near};
}

// Any targets, kCount vectors of them.
template <class T, Gamma kGamma, int kCount>
SK_NOINLINE void evaluate(const Vec<T> (&logits)[kCount], const Vec<T> (&targets)[kCount], const Params<T>& params,
                          Results<T> (&results)[kCount]) {
  const Vec<T> zero{}, gamma = splat<T>(params.gamma);
  for (int i = 0; i < kCount; ++i) {
    const Vec<T> x = logits[i], y = targets[i], off = splat<T>(1) - y;
    const auto [tail, near, far] = shared<T>(x);
    const Vec<T> up = max(zero, x) + tail, down = max(zero, -x) + tail;
    const auto right = greater_equal(x, zero);
    const Vec<T> p = select<T>(right, near, far), q = select<T>(right, far, near);
    const Vec<T> positive = splat<T>(params.positive) * power<T, kGamma>(q, up, params.gamma);
    const Vec<T> negative = splat<T>(params.negative) * power<T, kGamma>(p, down, params.gamma);
    const Vec<T> toward_one = y * positive * fma(gamma, vanishing<T>(p, down), q);
    const Vec<T> toward_zero = off * negative * fma(gamma, vanishing<T>(q, up), p);
    results[i] = {vanishing<T>(y * positive, down) + vanishing<T>(off * negative, up), toward_zero - toward_one,
                  vanishing<T>(positive, down) - vanishing<T>(negative, up)};
  }
}

// The same where every target is 0 or 1, which leaves one of the two terms, at z = x or z = -x; false, and nothing done,
// where one is not. The weights must not be 0.
template <class T, Gamma kGamma, bool kSlopes, int kCount>
SK_INLINE bool evaluate_hard(const Vec<T> (&logits)[kCount], const Vec<T> (&targets)[kCount], const Params<T>& params,
                             Results<T> (&results)[kCount]) {
  const Vec<T> zero{}, one = splat<T>(1);
  Mask<T> positive[kCount], hard = !none_set<T>();
  for (int i = 0; i < kCount; ++i) {
    positive[i] = equal(targets[i], one);
    hard = hard & (positive[i] | equal(targets[i], zero));
  }
  if (any(!hard)) return false;
  Shared<T> s[kCount];
  for (int i = 0; i < kCount; ++i) s[i] = shared<T>(logits[i]);
  for (int i = 0; i < kCount; ++i) {
    const Vec<T> x = logits[i], z = select<T>(positive[i], -x, x), softplus = max(zero, z) + s[i].tail;
    const auto right = greater_equal(z, zero);
    const Vec<T> p = select<T>(right, s[i].near, s[i].far);
    const Vec<T> weight = select<T>(positive[i], splat<T>(params.positive), splat<T>(params.negative)) *
                          power<T, kGamma>(p, max(zero, -z) + s[i].tail, params.gamma);
    results[i].loss = weight * softplus;
    if constexpr (kSlopes) {
      // q is 0 where the softplus is infinite, and so is their product.
      const Vec<T> q = select<T>(right, s[i].far, s[i].near);
      const Vec<T> finite = min(softplus, splat<T>(std::numeric_limits<T>::max()));
      const Vec<T> slope = weight * fma(splat<T>(params.gamma), q * finite, p);
      results[i].by_logits = select<T>(positive[i], -slope, slope);
    }
  }
  return true;
}

// kCount vectors from `at` on, or, of a single one, the first `count` elements; returns the sum of their losses.
template <class T, Gamma kGamma, bool kSlopes, int kCount>
SK_INLINE Vec<T> visit(const Params<T>& params, int64_t at, int count, bool streaming) {
  constexpr int lanes = kLanes<T>;
  const bool whole = count == lanes;
  Vec<T> x[kCount], y[kCount], sum{};
  for (int i = 0; i < kCount; ++i) {
    const T *logits = params.logits + at + i * lanes, *targets = params.targets + at + i * lanes;
    x[i] = whole ? load(logits) : load_first(logits, count);
    y[i] = whole ? load(targets) : load_first(targets, count);
  }
  Results<T> results[kCount]{};
  if (!params.may_be_hard || !evaluate_hard<T, kGamma, kSlopes>(x, y, params, results))
    evaluate<T, kGamma>(x, y, params, results);
  const auto put = [=](T* base, int i, Vec<T> v) {
    if (base == nullptr) return;
    T* to = base + at + i * lanes;
    if (!whole)
      store_first(to, v, count);
    else if (streaming)
      stream<T>(to, v);
    else
      store<T>(to, v);
  };
  for (int i = 0; i < kCount; ++i) {
    const Results<T>& r = results[i];
    put(params.loss, i, r.loss);
    if constexpr (kSlopes) {
      put(params.by_logits, i, r.by_logits * splat<T>(params.scale));
      put(params.by_targets, i, r.by_targets * splat<T>(params.scale));
    }
    sum = sum + r.loss;
  }
  return sum;
}

// The losses of [begin, end), added up if they are not stored.
template <class T, Gamma kGamma, bool kSlopes>
double run(const Params<T>& params, int64_t begin, int64_t end, bool streaming) {
  constexpr int lanes = kLanes<T>;
  constexpr int kGroup = 2;               // vectors whose chains of dependent steps overlap
  constexpr int64_t kStrip = 32 * lanes;  // short enough for sums in T
  double total = 0;
  for (int64_t at = begin; at < end;) {
    Vec<T> sum{};
    const int64_t stop = std::min(end, at + kStrip);
    for (; at + kGroup * lanes <= stop; at += kGroup * lanes) {
      prefetch<kGroup * sizeof(Vec<T>)>(params.logits + at, kAheadBytes);
      prefetch<kGroup * sizeof(Vec<T>)>(params.targets + at, kAheadBytes);
      sum = sum + visit<T, kGamma, kSlopes, kGroup>(params, at, lanes, streaming);
    }
    for (; at + lanes <= stop; at += lanes) sum = sum + visit<T, kGamma, kSlopes, 1>(params, at, lanes, streaming);
    total += horizontal_sum(sum);
    if (at < stop) {
      const int rest = static_cast<int>(stop - at);
      const Vec<T> last = visit<T, kGamma, kSlopes, 1>(params, at, rest, streaming);
      for (int i = 0; i < rest; ++i) total += last[i];
      at = stop;
    }
  }
  return total;
}

// Pieces of a fixed size, so that sums do not depend on the number of threads.
template <class T, bool kSlopes>
double run_all(const Params<T>& params, int64_t n, double gamma, bool streaming) {
  const int64_t pieces = (n + kGrain - 1) / kGrain;
  std::vector<double> sums(pieces);
  const auto piece = gamma == 0   ? run<T, Gamma::kZero, kSlopes>
                     : gamma == 1 ? run<T, Gamma::kOne, kSlopes>
                     : gamma == 2 ? run<T, Gamma::kTwo, kSlopes>
                                  : run<T, Gamma::kAny, kSlopes>;
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums[i] = piece(params, i * kGrain, std::min(n, (i + 1) * kGrain), streaming);
    if (streaming) stream_fence();
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

template <class T>
double launch(const Tensor& logits, const Tensor& targets, double alpha, double gamma, double pos_weight, double scale,
              T* loss, Tensor& by_logits, Tensor& by_targets) {
  const int64_t n = logits.numel();
  const auto wanted = [](Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
  const Params<T> params{static_cast<const T*>(logits.const_data_ptr()),
                         static_cast<const T*>(targets.const_data_ptr()),
                         loss,
                         wanted(by_logits),
                         wanted(by_targets),
                         static_cast<T>(pos_weight * alpha),
                         static_cast<T>(1 - alpha),
                         static_cast<T>(gamma),
                         static_cast<T>(scale),
                         static_cast<T>(pos_weight * alpha) > 0 && static_cast<T>(1 - alpha) > 0 &&
                             by_targets.numel() == 0};
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; };
  const bool streaming = n * static_cast<int64_t>(sizeof(T)) > kStreamBytes && aligned(params.loss) &&
                         aligned(params.by_logits) && aligned(params.by_targets);
  const bool slopes = params.by_logits != nullptr || params.by_targets != nullptr;
  return slopes ? run_all<T, true>(params, n, gamma, streaming) : run_all<T, false>(params, n, gamma, streaming);
}

bool is_single(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Float; }

void focal_loss_fwd(Tensor logits, Tensor targets, double alpha, double gamma, double pos_weight, Tensor loss,
                    Tensor by_logits, Tensor by_targets) {
  void* to = loss.mutable_data_ptr();
  if (is_single(logits))
    launch(logits, targets, alpha, gamma, pos_weight, 1, static_cast<float*>(to), by_logits, by_targets);
  else
    launch(logits, targets, alpha, gamma, pos_weight, 1, static_cast<double*>(to), by_logits, by_targets);
}

void focal_loss_total_fwd(Tensor logits, Tensor targets, double alpha, double gamma, double pos_weight, double scale,
                          Tensor total, Tensor by_logits, Tensor by_targets) {
  void* to = total.mutable_data_ptr();
  if (is_single(logits))
    *static_cast<float*>(to) = static_cast<float>(
        scale * launch<float>(logits, targets, alpha, gamma, pos_weight, scale, nullptr, by_logits, by_targets));
  else
    *static_cast<double*>(to) =
        scale * launch<double>(logits, targets, alpha, gamma, pos_weight, scale, nullptr, by_logits, by_targets);
}

// `grad` has the size of `slope`, or one element for all.
template <class T>
void product(const Tensor& grad, const Tensor& slope, Tensor& out) {
  constexpr int lanes = kLanes<T>;
  const int64_t n = slope.numel();
  const bool one = grad.dim() == 0;
  const auto* g = static_cast<const T*>(grad.const_data_ptr());
  const auto* s = static_cast<const T*>(slope.const_data_ptr());
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  const bool streaming =
      n * static_cast<int64_t>(sizeof(T)) > kStreamBytes && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
  torch::stable::parallel_for(0, (n + lanes - 1) / lanes, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t at = v * lanes;
      const int count = static_cast<int>(std::min<int64_t>(lanes, n - at));
      const Vec<T> factor = one ? splat<T>(*g) : load_first(g + at, count);
      if (count < lanes)
        store_first(to + at, factor * load_first(s + at, count), count);
      else if (streaming)
        stream<T>(to + at, factor * load(s + at));
      else
        store<T>(to + at, factor * load(s + at));
    }
    if (streaming) stream_fence();
  });
}

void focal_loss_bwd(Tensor grad, Tensor slope, Tensor out) {
  if (is_single(slope))
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
  m.def(
      "focal_loss_total_fwd(Tensor logits, Tensor targets, float alpha, float gamma, float pos_weight, float scale,"
      " Tensor(a!) total, Tensor(b!) by_logits, Tensor(c!) by_targets) -> ()");
  m.def("focal_loss_bwd(Tensor grad, Tensor slope, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("focal_loss_fwd", TORCH_BOX(&stablekern::focal_loss_fwd));
  m.impl("focal_loss_total_fwd", TORCH_BOX(&stablekern::focal_loss_total_fwd));
  m.impl("focal_loss_bwd", TORCH_BOX(&stablekern::focal_loss_bwd));
}
