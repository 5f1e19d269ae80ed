// AdamW with Langevin noise over a whole list of parameters in one pass: each moment and value is read and written once,
// and the normals are drawn in registers between, where they hide behind the memory traffic.
//
// A unit is what has one second moment per element. Work is cut into blocks of elements over all units, so that the
// number and sizes of the parameters do not matter to the balance of the threads; every element is independent, so the
// result does not depend on the cut.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "stablekern/adamw_rows.h"
#include "stablekern/caches.h"
#include "stablekern/philox.h"
#include "stablekern/simd.h"
#include "stablekern/spans.h"

namespace stablekern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 16384;  // elements of one piece of work, a multiple of kTile
constexpr int kQuietTile = 64;     // elements at a time where no normals are drawn
constexpr int kTilesAhead = 4;     // whose numbers are under way while one tile is worked on

using Kind = UnitKind;

struct Unit : AdamwRow {
  int members;
  Stream stream;
  double step_size, inverse_root;
};

template <class T>
struct Rule {
  T take_first, keep_second, take_second, eps, decay, noise_scale, noise_eps, cap, dead_cap, grad_scale;
  bool noisy, scales_grad;
  bool offset;  // whether noise_eps changes any gain that is below the cap
};

template <class T>
struct Pointers {  // of one tile
  T* value[2];
  const T* grad[2];
  T* exp_avg[2];
  T* square;
  T* largest;
  const T* normals;
};

template <class T>
SK_INLINE Vec<T> take(const T* p, int count) {
  return count >= kLanes<T> ? load(p) : load_first(p, std::max(count, 0));
}
template <class T>
SK_INLINE void put(T* p, Vec<T> v, int count) {
  if (count >= kLanes<T>)
    store(p, v);
  else
    store_first(p, v, std::max(count, 0));
}

// 1 / sqrt(s) for s > 0, whose square is 1 / s: both are wanted, and estimates with a Newton step are much cheaper than
// divisions. Infinity, of which the estimate makes NaN, apart.
template <class T>
SK_INLINE Vec<T> inverse_root_of(Vec<T> s) {
  return select<T>(greater(s, splat<T>(std::numeric_limits<T>::max())), Vec<T>{}, reciprocal_sqrt(s));
}

// The gain of the noise, r / (1 + noise_eps r) but capped, from r = 1 / sqrt(s).
template <class T>
SK_INLINE Vec<T> gain_of(Vec<T> square, Vec<T> r, const Rule<T>& rule) {
  Vec<T> gain = r, cap = splat<T>(rule.cap);
  if (rule.offset) gain = r / fma(splat<T>(rule.noise_eps), r, splat<T>(1));
  if (rule.dead_cap != rule.cap) cap = select<T>(equal(square, Vec<T>{}), splat<T>(rule.dead_cap), cap);
  return splat<T>(rule.noise_scale) * min(cap, gain);
}

// Elements i to i + kLanes, or the first `here` of them. Complex numbers stay side by side, in two vectors; what they
// share, one number for each, is doubled for that.
template <class T, Kind kKind, Layout kLayout>
SK_INLINE void update_vector(const Pointers<T>& at, int i, int here, const Rule<T>& rule, T step_size, T inverse_root) {
  constexpr bool side_by_side = kKind == Kind::kComplex;
  constexpr int lanes = kLanes<T>, vectors = side_by_side || kKind == Kind::kPair ? 2 : 1;
  const auto tensor = [](int k) { return side_by_side ? 0 : k; };
  const auto start = [&](int k) { return side_by_side ? 2 * i + k * lanes : i; };
  const auto count = [&](int k) { return side_by_side ? 2 * here - k * lanes : here; };
  Vec<T> g[2], size[2], inverse[2], noise[2];
  for (int k = 0; k < vectors; ++k) {
    g[k] = take(at.grad[tensor(k)] + start(k), count(k));
    if (rule.scales_grad) g[k] = g[k] / splat<T>(rule.grad_scale);
    size[k] = g[k] * g[k];
  }
  if constexpr (side_by_side) deinterleave<T>(size[0], size[1], size[0], size[1]);
  if constexpr (vectors == 2) size[0] = size[0] + size[1];
  Vec<T> v = fma(splat<T>(rule.take_second), size[0], splat<T>(rule.keep_second) * take(at.square + i, here));
  put(at.square + i, v, here);
  if (at.largest != nullptr) {
    v = max(take(at.largest + i, here), v);
    put(at.largest + i, v, here);
  }
  const Vec<T> r = inverse_root_of<T>(fma(sqrt(v), splat<T>(inverse_root), splat<T>(rule.eps)));
  inverse[0] = inverse[1] = r * r;
  if constexpr (side_by_side) interleave<T>(inverse[0], inverse[0], inverse[0], inverse[1]);
  if (rule.noisy) {
    const Vec<T> gain = gain_of(v, r, rule);
    if constexpr (kKind == Kind::kReal) {
      noise[0] = gain * take(at.normals + i, here);
    } else if constexpr (kLayout == Layout::kPlanes) {
      noise[0] = gain * take(at.normals + i, here);
      noise[1] = gain * take(at.normals + kTile / 2 + i, here);
      if constexpr (side_by_side) interleave<T>(noise[0], noise[1], noise[0], noise[1]);
    } else {
      const Vec<T> head = take(at.normals + 2 * i, 2 * here), tail = take(at.normals + 2 * i + lanes, 2 * here - lanes);
      if constexpr (side_by_side) {
        interleave<T>(gain, gain, noise[0], noise[1]);
        noise[0] = noise[0] * head;
        noise[1] = noise[1] * tail;
      } else {
        deinterleave<T>(head, tail, noise[0], noise[1]);
        noise[0] = gain * noise[0];
        noise[1] = gain * noise[1];
      }
    }
    if constexpr (kKind == Kind::kSecond) noise[0] = noise[1];
  }
  for (int k = 0; k < vectors; ++k) {
    T *const average = at.exp_avg[tensor(k)] + start(k), *const value = at.value[tensor(k)] + start(k);
    Vec<T> m = take(average, count(k)), p = take(value, count(k));
    m = fma(splat<T>(rule.take_first), g[k] - m, m);
    p = rule.noisy ? fma(p, splat<T>(rule.decay), noise[k]) : p * splat<T>(rule.decay);
    put(average, m, count(k));
    put(value, fma(m * inverse[k], splat<T>(-step_size), p), count(k));
  }
}

template <class T, Kind kKind, Layout kLayout>
SK_INLINE void update(const Pointers<T>& at, int count, const Rule<T>& rule, T step_size, T inverse_root) {
  constexpr int lanes = kLanes<T>;
  int i = 0;
  for (; i + lanes <= count; i += lanes) update_vector<T, kKind, kLayout>(at, i, lanes, rule, step_size, inverse_root);
  if (i < count) update_vector<T, kKind, kLayout>(at, i, count - i, rule, step_size, inverse_root);
}

// A float32 value whose rounded form is no longer the parameter has been written from outside: it follows.
template <class S>
void follow(float* value, const S* parameter, int count) {
  for (int i = 0; i < count; ++i) {
    const float written = static_cast<float>(parameter[i]);
    const float own = static_cast<float>(static_cast<S>(value[i]));
    value[i] = own == written ? value[i] : written;
  }
}
template <class S>
void widen(const S* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}
template <class S>
void round_to(const float* from, S* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<S>(from[i]);
}

template <Kind kKind>
constexpr int kWidth = kKind == Kind::kReal ? 1 : 2;  // normals per element
template <Kind kKind>
constexpr int kStep = kKind == Kind::kComplex ? 2 : 1;  // numbers per element in one tensor

// A tile takes about as long as the memory takes to bring its numbers, if it is asked for them in time: it is more
// instructions than the processor looks ahead.
template <class T, Kind kKind, int elements>
SK_INLINE void prefetch_tile(const Unit& unit, int64_t e) {
  constexpr int bytes = elements * static_cast<int>(sizeof(T));
  e += kTilesAhead * elements;
  for (int part = 0; part < unit.members; ++part)
    for (const void* numbers : {static_cast<const void*>(unit.value[part]), unit.grad[part],
                                static_cast<const void*>(unit.exp_avg[part])})
      prefetch<bytes * kStep<kKind>, 2>(numbers, e * kStep<kKind> * sizeof(T));
  prefetch<bytes, 2>(unit.square, e * sizeof(T));
}

template <class T, Kind kKind>
void run(const Unit& unit, int64_t begin, int64_t end, const Rule<T>& rule) {
  constexpr int width = kWidth<kKind>, step = kStep<kKind>;
  constexpr Layout layout = width == 2 ? Layout::kPlanes : Layout::kStream;  // of what is drawn here
  const bool draws = rule.noisy && unit.given == nullptr;
  alignas(kVectorBytes) T drawn[kTile];
  alignas(kVectorBytes) float wide[2][kQuietTile * step];
  for (int64_t e = begin; e < end;) {
    int64_t stop = std::min<int64_t>(end, e + kQuietTile);
    const T* normals = static_cast<const T*>(unit.given);
    if (draws) {
      const int64_t tile = (unit.offset + e) * width / kTile;
      stop = std::min(end, (tile + 1) * (kTile / width) - unit.offset);
      prefetch_tile<T, kKind, kTile / width>(unit, e);
      draw_tile<layout>(tile, unit.stream, drawn);
      normals = drawn + (unit.offset + e - tile * (kTile / width));
    } else {
      prefetch_tile<T, kKind, kQuietTile>(unit, e);
      if (rule.noisy) normals += e * width;
    }
    const int count = static_cast<int>(stop - e);
    Pointers<T> at{};
    for (int part = 0; part < unit.members; ++part) {
      at.value[part] = static_cast<T*>(unit.value[part]) + e * step;
      at.grad[part] = static_cast<const T*>(unit.grad[part]) + e * step;
      at.exp_avg[part] = static_cast<T*>(unit.exp_avg[part]) + e * step;
    }
    at.square = static_cast<T*>(unit.square) + e;
    at.largest = unit.largest == nullptr ? nullptr : static_cast<T*>(unit.largest) + e;
    at.normals = normals;
    // what(null pointer of the parameter's type, member)
    const auto each_member = [&](auto stored, const auto& what) {
      for (int part = 0; part < unit.members; ++part) what(static_cast<decltype(stored)*>(nullptr), part);
    };
    if constexpr (std::is_same_v<T, float>) {
      const auto before = [&](auto* tag, int part) {
        using S = std::remove_pointer_t<decltype(tag)>;
        follow(at.value[part], static_cast<const S*>(unit.rounded[part]) + e * step, count * step);
        widen(static_cast<const S*>(unit.grad[part]) + e * step, wide[part], count * step);
        at.grad[part] = wide[part];
      };
      if (unit.grad_type == SpanType::kBfloat16) each_member(BFloat16{}, before);
      if (unit.grad_type == SpanType::kHalf) each_member(Half{}, before);
    }
    const auto step_size = static_cast<T>(unit.step_size), inverse_root = static_cast<T>(unit.inverse_root);
    if (draws)
      update<T, kKind, layout>(at, count, rule, step_size, inverse_root);
    else
      update<T, kKind, Layout::kStream>(at, count, rule, step_size, inverse_root);
    if constexpr (std::is_same_v<T, float>) {
      const auto after = [&](auto* tag, int part) {
        using S = std::remove_pointer_t<decltype(tag)>;
        round_to(at.value[part], static_cast<S*>(unit.rounded[part]) + e * step, count * step);
      };
      if (unit.grad_type == SpanType::kBfloat16) each_member(BFloat16{}, after);
      if (unit.grad_type == SpanType::kHalf) each_member(Half{}, after);
    }
    e = stop;
  }
}

template <class T>
void run_any(const Unit& unit, int64_t begin, int64_t end, const Rule<T>& rule) {
  switch (unit.kind) {
    case Kind::kReal: return run<T, Kind::kReal>(unit, begin, end, rule);
    case Kind::kComplex: return run<T, Kind::kComplex>(unit, begin, end, rule);
    case Kind::kPair: return run<T, Kind::kPair>(unit, begin, end, rule);
    case Kind::kFirst: return run<T, Kind::kFirst>(unit, begin, end, rule);
    case Kind::kSecond: return run<T, Kind::kSecond>(unit, begin, end, rule);
  }
}

double read(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Float ? *static_cast<const float*>(scalar.const_data_ptr())
                                                   : *static_cast<const double*>(scalar.const_data_ptr());
}

struct Options {
  double lr, temperature, beta1, beta2, eps, weight_decay, noise_eps, max_noise_gain, grad_scale;
  bool noisy, maximize, scales;
};

template <class T>
Rule<T> rule_of(const Options& o) {
  Rule<T> rule;
  rule.take_first = static_cast<T>(1 - o.beta1);
  rule.keep_second = static_cast<T>(o.beta2);
  rule.take_second = static_cast<T>(1 - o.beta2);
  rule.eps = static_cast<T>(o.eps);
  rule.decay = static_cast<T>(1 - o.lr * o.weight_decay);
  rule.noise_scale = static_cast<T>(std::sqrt(2 * o.temperature * o.lr));
  rule.noise_eps = static_cast<T>(o.noise_eps);
  rule.cap = static_cast<T>(o.max_noise_gain);
  rule.dead_cap = static_cast<T>(std::min(o.max_noise_gain, 1.0));
  rule.grad_scale = static_cast<T>(o.maximize ? -o.grad_scale : o.grad_scale);
  rule.scales_grad = o.maximize || o.scales;
  rule.noisy = o.noisy;
  // There r < cap / (1 - noise_eps cap), and from half an ulp on, 1 + noise_eps r is not 1.
  rule.offset = o.noise_eps * o.max_noise_gain >= std::numeric_limits<T>::epsilon() / 4;
  return rule;
}

// What depends on the number of the step, which most units share.
struct Correction {
  double count, step_size, inverse_root;

  Correction(double step, const Options& o)
      : count(step),
        step_size(o.lr / (1 - std::pow(o.beta1, step))),
        inverse_root(1 / std::sqrt(1 - std::pow(o.beta2, step))) {}
};

Unit unit_of(const AdamwRow& row, const Correction& correction, uint32_t seed_low, uint32_t seed_high) {
  Unit unit{row};
  unit.members = unit.kind == Kind::kPair ? 2 : 1;
  // A normal that the caller drew is the member's own: there is no partner's to pass over.
  if (unit.given != nullptr && (unit.kind == Kind::kFirst || unit.kind == Kind::kSecond)) unit.kind = Kind::kReal;
  unit.step_size = correction.step_size;
  unit.inverse_root = correction.inverse_root;
  const auto step = static_cast<uint32_t>(static_cast<int64_t>(correction.count));
  unit.stream = Stream{static_cast<uint32_t>(unit.parameter), step, seed_low, seed_high};
  return unit;
}

void step_units(const std::vector<Unit>& units, const Options& options) {
  std::vector<int64_t> ends(units.size());  // of each unit's blocks
  int64_t blocks = 0;
  for (size_t i = 0; i < units.size(); ++i) ends[i] = blocks += (units[i].size + kBlock - 1) / kBlock;
  const Rule<float> single = rule_of<float>(options);
  const Rule<double> twofold = rule_of<double>(options);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t block = begin; block < end; ++block) {
      while (block >= ends[i]) ++i;
      const Unit& unit = units[i];
      const int64_t own = block - (i == 0 ? 0 : ends[i - 1]);
      const int64_t from = own * kBlock, to = std::min(unit.size, from + kBlock);
      if (unit.value_type == SpanType::kDouble)
        run_any<double>(unit, from, to, twofold);
      else
        run_any<float>(unit, from, to, single);
    }
  });
}

// `table` is rows of `AdamwRow`. Where `found_inf` is not 0, nothing changes.
void complex_adamw(Tensor table, Tensor lr, std::optional<Tensor> temperature, std::optional<Tensor> found_inf,
                   std::optional<Tensor> grad_scale, double beta1, double beta2, double eps, double weight_decay,
                   double noise_eps, double max_noise_gain, bool maximize, int64_t seed_low, int64_t seed_high) {
  if (found_inf && read(*found_inf) != 0) return;
  const Options options{read(lr),
                        temperature ? read(*temperature) : 0.0,
                        beta1,
                        beta2,
                        eps,
                        weight_decay,
                        noise_eps,
                        max_noise_gain,
                        grad_scale ? read(*grad_scale) : 1.0,
                        temperature.has_value(),
                        maximize,
                        grad_scale.has_value()};
  const auto* row = static_cast<const AdamwRow*>(table.const_data_ptr());
  std::vector<Unit> units;
  units.reserve(table.size(0));
  Correction correction(1, options);
  for (int64_t i = 0; i < table.size(0); ++i, ++row) {
    for (double* step : row->step)
      if (step != nullptr) *step += 1;
    if (*row->step[0] != correction.count) correction = Correction(*row->step[0], options);
    units.push_back(unit_of(*row, correction, static_cast<uint32_t>(seed_low), static_cast<uint32_t>(seed_high)));
  }
  step_units(units, options);
}

void philox_normal(int64_t start, int64_t seed_low, int64_t seed_high, Tensor step, int64_t parameter, Tensor out) {
  const int64_t epoch = *static_cast<const int64_t*>(step.const_data_ptr());
  const Stream stream{static_cast<uint32_t>(parameter), static_cast<uint32_t>(epoch), static_cast<uint32_t>(seed_low),
                      static_cast<uint32_t>(seed_high)};
  const int64_t count = out.numel();
  const auto fill = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const int64_t first = start / kTile, last = (start + count + kTile - 1) / kTile;
    torch::stable::parallel_for(first, last, kBlock / kTile, [&](int64_t begin, int64_t end) {
      alignas(kVectorBytes) T drawn[kTile];
      for (int64_t tile = begin; tile < end; ++tile) {
        draw_tile(tile, stream, drawn);
        const int64_t from = std::max(start, tile * kTile), stop = std::min(start + count, (tile + 1) * kTile);
        std::copy(drawn + (from - tile * kTile), drawn + (stop - tile * kTile), to + (from - start));
      }
    });
  };
  if (count == 0) return;
  if (out.scalar_type() == ScalarType::Float)
    fill(static_cast<float*>(out.mutable_data_ptr()));
  else
    fill(static_cast<double*>(out.mutable_data_ptr()));
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "complex_adamw(Tensor table, Tensor lr, Tensor? temperature, Tensor? found_inf, Tensor? grad_scale, float beta1,"
      " float beta2, float eps, float weight_decay, float noise_eps, float max_noise_gain, bool maximize, int seed_low,"
      " int seed_high) -> ()");
  m.def(
      "philox_normal(int start, int seed_low, int seed_high, Tensor step, int parameter, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) { m.impl("complex_adamw", TORCH_BOX(&stablekern::complex_adamw)); }
STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) { m.impl("philox_normal", TORCH_BOX(&stablekern::philox_normal)); }
