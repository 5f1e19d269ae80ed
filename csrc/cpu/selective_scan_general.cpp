// The Mamba-1 scan and its adjoint where states are complex, or B or C does not depend on time; all else is
// selective_scan.cpp's. The mathematics is in stablekern/ops/selective_scan.py.
//
// One kernel for real and complex elements. Channels are the lanes, as there; one state after another goes through a few
// steps of one block of lanes, since an exponential with a sine and a cosine is work enough to hide what it waits for.
// Backward, per chunk and block: recompute and keep what one state was, then sweep back. The sums over channels for dB and
// dC stay vectors until all blocks of the chunk have been added.
//
// One task is one batch item and group, so no result depends on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "stablekern/complex_simd.h"
#include "stablekern/clamp.h"
#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/tensor.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlockSteps = 16;  // of the forward pass

// All numbers as T, complex ones as two of them.
template <class T>
struct Problem {
  int64_t batch, channels, length, groups, states, chunk;
  int64_t reverse_channels;  // so many, the last ones, begin with the last step in memory
  bool softplus;
  const T *u, *delta, *A, *B, *C;
  bool enter_constant, leave_constant;  // B, C
  const T *D, *z, *bias;                // or null
  const T *lower, *upper;               // (channels, states) or null; `upper` alone bounds a modulus

  int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

// ---- elements -----------------------------------------------------------------------------------------------------

// The lanes are `count` elements that lie `apart` elements from one to the next.
template <class S>
Element<S> gather(const RealOf<S>* from, int64_t apart, int64_t count) {
  Element<S> v{};
  for (int64_t k = 0; k < count; ++k)
    if constexpr (kIsComplex<S>)
      v.re[k] = from[2 * k * apart], v.im[k] = from[2 * k * apart + 1];
    else
      v[k] = from[k * apart];
  return v;
}
template <class S>
void scatter(Element<S> v, int64_t apart, int64_t count, RealOf<S>* to) {
  for (int64_t k = 0; k < count; ++k)
    if constexpr (kIsComplex<S>)
      to[2 * k * apart] = v.re[k], to[2 * k * apart + 1] = v.im[k];
    else
      to[k * apart] = v[k];
}
template <class S>
SK_INLINE Element<S> everywhere(const RealOf<S>* from) {
  if constexpr (kIsComplex<S>)
    return {splat(from[0]), splat(from[1])};
  else
    return splat(*from);
}
template <class S>
void store_sum(Element<S> v, RealOf<S>* to) {
  if constexpr (kIsComplex<S>)
    to[0] = horizontal_sum(v.re), to[1] = horizontal_sum(v.im);
  else
    *to = horizontal_sum(v);
}
template <class S>
SK_INLINE Element<S> exponential(Element<S> x) {
  using T = RealOf<S>;
  if constexpr (kIsComplex<S>) {
    const Vec<T> size = exp<T>(x.re);
    const SineCosine<T> turn = sine_cosine<T>(x.im);
    return {size * turn.cosine, size * turn.sine};
  } else {
    return exp<T>(x);
  }
}
// conj(a) b
template <class E>
SK_INLINE E conj_times(E a, E b) {
  return fma_conj(a, b, E{});
}

// What one state has of its own, in all lanes of a block.
template <class S>
struct Law {
  using T = RealOf<S>;
  using E = Element<S>;
  E rate, enter, leave;  // A, and B and C where they are constant
  Vec<T> lower, upper;
  // Of complex states: a square below `inner` is that of a modulus within `upper`, one below `usual` tells the modulus.
  Vec<T> inner, usual;

  void bound(Vec<T> lower_, Vec<T> upper_, int64_t lanes) {
    lower = lower_, upper = upper_;
    const Vec<T> almost = upper * splat(1 - 8 * std::numeric_limits<T>::epsilon());
    inner = select(less(almost, splat(2 * std::sqrt(std::numeric_limits<T>::min()))), Vec<T>{}, almost * almost);
    for (int64_t k = lanes; k < kLanes<T>; ++k) inner[k] = std::numeric_limits<T>::infinity();  // no channel: never clamped
    usual = select(equal(inner, Vec<T>{}), Vec<T>{}, splat(std::numeric_limits<T>::infinity()));
  }
  // Whether the states of all lanes are, which is mostly so.
  SK_INLINE bool within(Vec<T> square) const { return __builtin_expect(!any(!less(square, inner)), true); }

  struct Polar {
    Mask<T> outside;
    E unit;          // v / |v|
    Vec<T> shrink;  // upper / |v|
  };
  SK_INLINE Polar polar(E v, Vec<T> square) const {
    const Vec<T> inverse = reciprocal_sqrt(square);
    const Polar plain = {greater(square, upper * upper), v * inverse, upper * inverse};
    const Mask<T> rare = !less(square, usual);
    if (__builtin_expect(!any(rare), true)) return plain;
    // In units in which no square over- or underflows.
    const PowerOfTwo<T> unit = power_of_two<T>(part_size(v));
    const E scaled = v * unit.down;
    const Vec<T> size = modulus(scaled);
    return {(rare & greater(size * unit.up, upper)) | (!rare & plain.outside),
            select(rare, scaled * (splat<T>(1) / size), plain.unit),
            select(rare, upper / size * unit.down, plain.shrink)};
  }
  SK_INLINE E clamp(E free) const {
    if constexpr (kIsComplex<S>) {
      const Vec<T> square = add_square(free, Vec<T>{});
      if (within(square)) return free;
      const Polar v = polar(free, square);
      return select(v.outside, v.unit * upper, free);
    } else {
      return min(upper, max(lower, free));  // NaN, the second operand, passes
    }
  }
  // Where the clamp changes a state.
  SK_INLINE Mask<T> outside(E free) const {
    if constexpr (kIsComplex<S>)
      return polar(free, add_square(free, Vec<T>{})).outside;
    else
      return less(free, lower) | less(upper, free);
  }
  SK_INLINE E through_clamp(E grad, E free) const {
    if constexpr (kIsComplex<S>) {
      const Vec<T> square = add_square(free, Vec<T>{});
      if (within(square)) return grad;
      const Polar v = polar(free, square);
      const E tangent = grad - v.unit * real_part(conj_times(v.unit, grad));
      return select(v.outside, tangent * v.shrink, grad);
    } else {
      return select(less_equal(lower, free) & less_equal(free, upper), grad, Vec<T>{});
    }
  }
};

// What one step has, in all lanes of a block.
template <class T>
struct Row {
  Vec<T> u, step, token;       // token: step u
  Vec<T> y;                    // before the gate
  Vec<T> slope;                // of the step
  Vec<T> grad_out, z, grad_y;  // behind the gate, the gate, and before it
  Vec<T> by_token, by_step;    // sums over states of Re G conj(B), and of Re conj(A) q
};

// One block of lanes over a few steps.
template <class S>
struct Strip {
  using T = RealOf<S>;
  using E = Element<S>;
  const Problem<T>& p;
  int64_t channel, lanes, steps;
  bool backwards;          // in memory
  int64_t place, offset;   // of the steps in memory: in a row, and in rows (batch, channels, length)
  const T *enter, *leave;  // B and C of the group at the first step
  Law<S>* laws;            // [states]
  Row<T>* rows;            // [steps], in the order of the scan, in memory for padded_to_lanes(steps)

  Strip(const Problem<T>& problem, int64_t item, int64_t group, int64_t block, int64_t start, int64_t count, Law<S>* all_laws,
        Row<T>* first_row)
      : p(problem), steps(count), laws(all_laws + block * p.states) {
    const int64_t own = p.channels / p.groups;
    channel = group * own + block * kLanes<T>;
    lanes = std::min<int64_t>(kLanes<T>, own - block * kLanes<T>);
    backwards = channel >= p.channels - p.reverse_channels;
    place = backwards ? p.length - start - count : start;
    offset = (item * p.channels + channel) * p.length + place;
    // What is turned comes in whole vectors, which leave something behind the last step that they read.
    rows = first_row + (backwards ? padded_to_lanes<T>(count) - count : 0);
    const int64_t row = (item * p.groups + group) * p.states * p.length + in_memory(0);
    enter = p.B + row * kParts<S>, leave = p.C + row * kParts<S>;
  }
  SK_INLINE int64_t in_memory(int64_t t) const { return place + (backwards ? steps - 1 - t : t); }
  SK_INLINE E enters(int64_t i, int64_t t) const {
    return p.enter_constant ? laws[i].enter : everywhere<S>(enter + (i * p.length + (backwards ? -t : t)) * kParts<S>);
  }
  SK_INLINE E leaves(int64_t i, int64_t t) const {
    return p.leave_constant ? laws[i].leave : everywhere<S>(leave + (i * p.length + (backwards ? -t : t)) * kParts<S>);
  }
  SK_INLINE Mask<T> channels() const {
    IVec<T> left;
    for (int k = 0; k < kLanes<T>; ++k) left[k] = static_cast<typename VecTypes<T>::integer>(lanes - k);
    return greater_than<T>(left, 0);
  }
  // `of`, one member of each row, from and to rows (channels, time).
  void in(const T* from, Vec<T> Row<T>::* of) const {
    load_turned(from + offset, p.length, lanes, steps, 0, &(rows[backwards ? steps - 1 : 0].*of), apart());
  }
  void out(Vec<T> Row<T>::* of, T* to) const {
    store_turned(&(rows[backwards ? steps - 1 : 0].*of), lanes, steps, 0, to + offset, p.length, apart());
  }
  int64_t apart() const { return (backwards ? -1 : 1) * static_cast<int64_t>(sizeof(Row<T>) / sizeof(Vec<T>)); }
  Vec<T> per_channel(const T* from) const {
    return from ? load_first(from + channel, static_cast<int>(lanes)) : Vec<T>{};
  }
  // Steps, tokens and what the skip adds to y.
  void prepare() const {
    in(p.u, &Row<T>::u), in(p.delta, &Row<T>::step);
    if (p.z) in(p.z, &Row<T>::z);
    const Vec<T> bias = per_channel(p.bias), skip = per_channel(p.D), one = splat<T>(1);
    for (Row<T>* row = rows; row < rows + steps; ++row) {
      Vec<T> step = row->step + bias;
      row->slope = one;
      if (p.softplus) {
        const Softplus<T> soft = softplus<T>(step);
        row->slope = soft.slope;
        // An error of the step turns a complex state and does not decay: double gets what its oracle has.
        if constexpr (sizeof(T) == 8)
          for (int k = 0; k < kLanes<T>; ++k) step[k] = std::max(T(0), step[k]) + std::log1p(std::exp(-std::abs(step[k])));
        else
          step = soft.value;
      }
      row->step = step, row->token = step * row->u, row->y = p.D ? skip * row->u : Vec<T>{};
    }
  }
};

template <class S>
constexpr int kCounted = kIsComplex<S> ? 2 : 1;  // how often a state counts in y: a complex one is a conjugate pair

template <class S>
void laws_in(const Problem<RealOf<S>>& p, int64_t group, Law<S>* laws) {
  using T = RealOf<S>;
  const int64_t own = p.channels / p.groups;
  for (int64_t first = 0; first < own; first += kLanes<T>)
    for (int64_t i = 0; i < p.states; ++i, ++laws) {
      const int64_t at = (group * own + first) * p.states + i, count = std::min<int64_t>(kLanes<T>, own - first);
      *laws = Law<S>{};
      laws->rate = gather<S>(p.A + at * kParts<S>, p.states, count);
      if (p.enter_constant) laws->enter = gather<S>(p.B + at * kParts<S>, p.states, count);
      if (p.leave_constant) laws->leave = gather<S>(p.C + at * kParts<S>, p.states, count);
      const auto gathered = [&](const T* from) { return from ? gather<T>(from + at, p.states, count) : Vec<T>{}; };
      laws->bound(gathered(p.lower), gathered(p.upper), count);
    }
}

template <class S>
int64_t blocks_of(const Problem<RealOf<S>>& p) {
  return padded_to_lanes<RealOf<S>>(p.channels / p.groups) / kLanes<RealOf<S>>;
}

// ---- forward ------------------------------------------------------------------------------------------------------

// If states that the clamp changed are counted, their share goes to `saturation` (batch, channels).
template <class S, Clamp kClamp>
void forward(const Problem<RealOf<S>>& p, const RealOf<S>* initial_state, RealOf<S>* y, RealOf<S>* last_state,
             RealOf<S>* chunk_states, RealOf<S>* saturation) {
  using T = RealOf<S>;
  using E = Element<S>;
  torch::stable::parallel_for(0, p.batch * p.groups, 1, [&](int64_t begin, int64_t end) {
    Arena arena;
    arena.reserve<Law<S>>(blocks_of<S>(p) * p.states);
    arena.reserve<E>(p.states);
    arena.reserve<Row<T>>(kBlockSteps);
    arena.allocate();
    auto* laws = arena.take<Law<S>>(blocks_of<S>(p) * p.states);
    auto* state = arena.take<E>(p.states);
    auto* memory = arena.take<Row<T>>(kBlockSteps);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / p.groups, group = task % p.groups;
      laws_in<S>(p, group, laws);
      for (int64_t b = 0; b < blocks_of<S>(p); ++b) {
        double changed[kLanes<T>] = {};  // how often, per channel
        for (int64_t start = 0, steps; start < p.length || start == 0; start += steps) {
          steps = std::min({kBlockSteps, p.length - start, p.chunk - start % p.chunk});
          const Strip<S> s(p, item, group, b, start, steps, laws, memory);
          const int64_t boundary = (item * p.channels + s.channel) * p.states * kParts<S>;
          if (start == 0)
            for (int64_t i = 0; i < p.states; ++i)
              state[i] = initial_state ? gather<S>(initial_state + boundary + i * kParts<S>, p.states, s.lanes) : E{};
          if (p.length == 0) {
            for (int64_t i = 0; i < p.states; ++i)
              scatter<S>(state[i], p.states, s.lanes, last_state + boundary + i * kParts<S>);
            if constexpr (kClamp == Clamp::kCount) std::fill_n(saturation + item * p.channels + s.channel, s.lanes, T(0));
            break;
          }
          s.prepare();
          Vec<T> count{};
          T* save = chunk_states + ((item * p.chunks() + start / p.chunk) * p.states * p.channels + s.channel) * kParts<S>;
          for (int64_t i = 0; i < p.states; ++i) {
            const Law<S> law = s.laws[i];
            E h = state[i];
            if (start % p.chunk == 0) scatter<S>(h, 1, s.lanes, save + i * p.channels * kParts<S>);
            for (int64_t t = 0; t < steps; ++t) {
              Row<T>& row = s.rows[t];
              h = fma(exponential<S>(law.rate * row.step), h, s.enters(i, t) * row.token);
              if constexpr (kClamp == Clamp::kCount) count += select(law.outside(h), splat<T>(1), Vec<T>{});
              if constexpr (kClamp != Clamp::kNone) h = law.clamp(h);
              row.y = fma(splat<T>(kCounted<S>), real_part(h * s.leaves(i, t)), row.y);
            }
            state[i] = h;
            if (start + steps == p.length) scatter<S>(h, p.states, s.lanes, last_state + boundary + i * kParts<S>);
          }
          if (p.z)
            for (Row<T>* row = s.rows; row < s.rows + steps; ++row) row->y *= row->z * sigmoid<T>(row->z);
          s.out(&Row<T>::y, y);
          if constexpr (kClamp == Clamp::kCount)
            for (int64_t k = 0; k < s.lanes; ++k) {
              changed[k] += count[k];
              saturation[item * p.channels + s.channel + k] =
                  static_cast<T>(changed[k] / static_cast<double>(std::max<int64_t>(1, p.length * p.states)));
            }
        }
      }
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct Gradients {
  T *u, *delta, *A, *B, *C, *D, *z, *bias, *initial_state;
};

template <class S, bool kClamp>
void backward(const Problem<RealOf<S>>& p, const RealOf<S>* grad_out, const RealOf<S>* grad_last_state,
              const RealOf<S>* chunk_states, const Gradients<RealOf<S>>& out) {
  using T = RealOf<S>;
  using E = Element<S>;
  struct Past {
    E state, decay, free;  // before the step, of it, and behind it before the clamp
  };
  // What is summed over the batch in the end, per item.
  const int64_t all_states = p.channels * p.states * kParts<S>;
  std::vector<T> rates(p.batch * all_states), skips(p.batch * p.channels), biases(p.batch * p.channels);
  std::vector<T> enters(p.enter_constant ? p.batch * all_states : 0), leaves(p.leave_constant ? p.batch * all_states : 0);
  torch::stable::parallel_for(0, p.batch * p.groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t blocks = blocks_of<S>(p), most = std::min(p.chunk, p.length);
    Law<S>* laws;
    E *carry, *grad_rate, *grad_enter, *grad_leave;  // [blocks][states]
    E *sum_enter, *sum_leave;                        // [steps][states], to be summed over lanes
    Vec<T> *grad_skip, *grad_bias;                   // [blocks]
    Row<T>* memory;
    Past* past;
    Arena arena;
    const auto each = [&](const auto& visit) {
      visit(laws, blocks * p.states);
      for (auto* all : {&carry, &grad_rate, &grad_enter, &grad_leave}) visit(*all, blocks * p.states);
      for (auto* sum : {&sum_enter, &sum_leave}) visit(*sum, most * p.states);
      for (auto* all : {&grad_skip, &grad_bias}) visit(*all, blocks);
      visit(memory, padded_to_lanes<T>(most)), visit(past, most);
    };
    each([&]<class V>(V*&, int64_t count) { arena.reserve<V>(count); });
    arena.allocate();
    each([&]<class V>(V*& pointer, int64_t count) { pointer = arena.take<V>(count); });
    const Vec<T> kappa = splat<T>(kCounted<S>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / p.groups, group = task % p.groups;
      laws_in<S>(p, group, laws);
      for (auto* all : {grad_rate, grad_enter, grad_leave}) std::fill_n(all, blocks * p.states, E{});
      for (auto* all : {grad_skip, grad_bias}) std::fill_n(all, blocks, Vec<T>{});
      const auto boundary = [&](int64_t b, int64_t i) {
        return (((item * p.channels + group * (p.channels / p.groups) + b * kLanes<T>) * p.states) + i) * kParts<S>;
      };
      const auto lanes = [&](int64_t b) { return std::min<int64_t>(kLanes<T>, p.channels / p.groups - b * kLanes<T>); };
      const auto each_state = [&](const auto& visit) {
        for (int64_t b = 0; b < blocks; ++b)
          for (int64_t i = 0; i < p.states; ++i) visit(b * p.states + i, boundary(b, i), lanes(b));
      };
      each_state([&](int64_t k, int64_t at, int64_t count) {
        carry[k] = grad_last_state ? gather<S>(grad_last_state + at, p.states, count) : E{};
      });
      for (int64_t start = (p.chunks() - 1) * p.chunk; start >= 0; start -= p.chunk) {
        const int64_t steps = std::min(p.chunk, p.length - start);
        for (auto* sum : {sum_enter, sum_leave}) std::fill_n(sum, most * p.states, E{});
        for (int64_t b = 0; b < blocks; ++b) {
          const Strip<S> s(p, item, group, b, start, steps, laws, memory);
          Row<T>* const rows = s.rows;
          const Mask<T> channels = s.channels();
          s.prepare();
          s.in(grad_out, &Row<T>::grad_out);
          for (Row<T>* row = rows; row < rows + steps; ++row) {
            row->grad_y = p.z ? row->grad_out * row->z * sigmoid<T>(row->z) : row->grad_out;
            row->by_token = row->by_step = Vec<T>{};
          }
          const T* saved = chunk_states + ((item * p.chunks() + start / p.chunk) * p.states * p.channels + s.channel) * kParts<S>;
          for (int64_t i = 0; i < p.states; ++i) {
            const Law<S> law = s.laws[i];
            const int64_t k = b * p.states + i;
            E h = gather<S>(saved + i * p.channels * kParts<S>, 1, s.lanes);
            for (int64_t t = 0; t < steps; ++t) {
              Row<T>& row = rows[t];
              const E decay = exponential<S>(law.rate * row.step), free = fma(decay, h, s.enters(i, t) * row.token);
              past[t] = {h, decay, free};
              h = free;
              if constexpr (kClamp) h = law.clamp(free);
              row.y = fma(kappa, real_part(h * s.leaves(i, t)), row.y);
              const E by_leave = conj(h) * (kappa * row.grad_y);
              if (p.leave_constant)
                grad_leave[k] = grad_leave[k] + by_leave;
              else
                sum_leave[t * p.states + i] = sum_leave[t * p.states + i] + select(channels, by_leave, E{});
            }
            E r = carry[k], by_rate{};
            for (int64_t t = steps - 1; t >= 0; --t) {
              Row<T>& row = rows[t];
              E grad = r + conj(s.leaves(i, t)) * (kappa * row.grad_y);
              if constexpr (kClamp) grad = law.through_clamp(grad, past[t].free);
              const E by_enter = grad * row.token;
              if (p.enter_constant)
                grad_enter[k] = grad_enter[k] + by_enter;
              else
                sum_enter[t * p.states + i] = sum_enter[t * p.states + i] + select(channels, by_enter, E{});
              row.by_token += real_part(conj_times(s.enters(i, t), grad));
              r = conj_times(past[t].decay, grad);
              const E by_exponent = conj_times(past[t].state, r);
              by_rate = by_rate + by_exponent * row.step;
              row.by_step += real_part(conj_times(law.rate, by_exponent));
            }
            carry[k] = r;
            grad_rate[k] = grad_rate[k] + by_rate;
          }
          const Vec<T> skip = s.per_channel(p.D), one = splat<T>(1);
          for (Row<T>* row = rows; row < rows + steps; ++row) {
            const Vec<T> by_token = row->by_token, open = p.z ? sigmoid<T>(row->z) : one;
            row->by_token = p.D ? fma(skip, row->grad_y, row->step * by_token) : row->step * by_token;  // now that of u,
            row->by_step = fma(row->u, by_token, row->by_step) * row->slope;                            // of delta
            grad_skip[b] = fma(row->grad_y, row->u, grad_skip[b]);
            grad_bias[b] += row->by_step;
            if (p.z) row->y *= row->grad_out * (open * fma(row->z, one - open, one));  // and of z
          }
          s.out(&Row<T>::by_token, out.u), s.out(&Row<T>::by_step, out.delta);
          if (p.z) s.out(&Row<T>::y, out.z);
        }
        const Strip<S> s(p, item, group, 0, start, steps, laws, memory);
        const int64_t to = (item * p.groups + group) * p.states * p.length;
        for (int64_t i = 0; i < p.states; ++i)
          for (int64_t t = 0; t < steps; ++t) {
            const int64_t at = (to + i * p.length + s.in_memory(t)) * kParts<S>, from = t * p.states + i;
            if (!p.enter_constant) store_sum<S>(sum_enter[from], out.B + at);
            if (!p.leave_constant) store_sum<S>(sum_leave[from], out.C + at);
          }
      }
      each_state([&](int64_t k, int64_t at, int64_t count) {
        scatter<S>(carry[k], p.states, count, out.initial_state + at);
        scatter<S>(grad_rate[k], p.states, count, rates.data() + at);
        if (p.enter_constant) scatter<S>(grad_enter[k], p.states, count, enters.data() + at);
        if (p.leave_constant) scatter<S>(grad_leave[k], p.states, count, leaves.data() + at);
      });
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = item * p.channels + group * (p.channels / p.groups) + b * kLanes<T>;
        scatter<T>(grad_skip[b], 1, lanes(b), skips.data() + at);
        scatter<T>(grad_bias[b], 1, lanes(b), biases.data() + at);
      }
    }
  });
  const auto over_batch = [&](const std::vector<T>& terms, int64_t size, T* to) {
    for (int64_t k = 0; k < size; ++k) {
      double sum = 0;
      for (int64_t item = 0; item < p.batch; ++item) sum += terms[item * size + k];
      to[k] = static_cast<T>(sum);
    }
  };
  over_batch(rates, all_states, out.A);
  over_batch(skips, p.channels, out.D);
  over_batch(biases, p.channels, out.bias);
  if (p.enter_constant) over_batch(enters, all_states, out.B);
  if (p.leave_constant) over_batch(leaves, all_states, out.C);
}

// ---- tensors ------------------------------------------------------------------------------------------------------

template <class T>
Problem<T> problem(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                   const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& lower, const std::optional<Tensor>& upper, int64_t reverse_channels,
                   bool softplus, int64_t chunk) {
  // Where B and C are constant, the channels of one direction are a group.
  const int64_t directions = reverse_channels > 0 && reverse_channels < u.size(1) ? 2 : 1;
  const int64_t groups = B.dim() == 4 ? B.size(1) : C.dim() == 4 ? C.size(1) : directions;
  return {u.size(0),  u.size(1),      u.size(2),      groups,     A.size(1),  chunk,        reverse_channels, softplus,
          data<T>(u), data<T>(delta), data<T>(A),     data<T>(B), data<T>(C), B.dim() == 2, C.dim() == 2,     data<T>(D),
          data<T>(z), data<T>(bias),  data<T>(lower), data<T>(upper)};
}

// f(S{}) with the type of A's elements.
template <class F>
void for_element(const Tensor& u, const Tensor& A, const F& f) {
  for_dtype(u, [&]<class T>(T) { A.scalar_type() == u.scalar_type() ? f(T{}) : f(std::complex<T>{}); });
}

void selective_scan_general_fwd(const Tensor u, const Tensor delta, const Tensor A, const Tensor B, const Tensor C,
                                const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                                const std::optional<Tensor> initial_state, const std::optional<Tensor> lower,
                                const std::optional<Tensor> upper, int64_t reverse_channels, bool softplus, int64_t chunk,
                                bool count, Tensor y, Tensor last_state, Tensor chunk_states, Tensor saturation) {
  for_element(u, A, [&]<class S>(S) {
    using T = RealOf<S>;
    const auto p = problem<T>(u, delta, A, B, C, D, z, bias, lower, upper, reverse_channels, softplus, chunk);
    if (p.batch * p.channels == 0) return;
    const auto run = !p.upper ? forward<S, Clamp::kNone> : count ? forward<S, Clamp::kCount> : forward<S, Clamp::kApply>;
    run(p, data<T>(initial_state), mutable_data<T>(y), mutable_data<T>(last_state), mutable_data<T>(chunk_states),
        mutable_data<T>(saturation));
  });
}

void selective_scan_general_bwd(const Tensor grad_y, const std::optional<Tensor> grad_last_state, const Tensor u,
                                const Tensor delta, const Tensor A, const Tensor B, const Tensor C,
                                const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                                const std::optional<Tensor> lower, const std::optional<Tensor> upper, const Tensor chunk_states,
                                int64_t reverse_channels, bool softplus, int64_t chunk, Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B,
                                Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_bias, Tensor grad_initial_state) {
  for_element(u, A, [&]<class S>(S) {
    using T = RealOf<S>;
    const auto p = problem<T>(u, delta, A, B, C, D, z, bias, lower, upper, reverse_channels, softplus, chunk);
    if (p.batch * p.channels == 0) {
      for (Tensor* empty_sum : {&grad_A, &grad_B, &grad_C})
        std::fill_n(mutable_data<T>(*empty_sum), empty_sum->numel() * kParts<S>, T(0));
      for (Tensor* empty_sum : {&grad_D, &grad_bias}) std::fill_n(mutable_data<T>(*empty_sum), empty_sum->numel(), T(0));
      return;
    }
    const auto run = p.upper ? backward<S, true> : backward<S, false>;
    run(p, data<T>(grad_y), data<T>(grad_last_state), data<T>(chunk_states),
        Gradients<T>{mutable_data<T>(grad_u), mutable_data<T>(grad_delta), mutable_data<T>(grad_A),
                     mutable_data<T>(grad_B), mutable_data<T>(grad_C), mutable_data<T>(grad_D), mutable_data<T>(grad_z),
                     mutable_data<T>(grad_bias), mutable_data<T>(grad_initial_state)});
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "selective_scan_general_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias,"
      " Tensor? initial_state, Tensor? lower, Tensor? upper, int reverse_channels, bool softplus, int chunk, bool count,"
      " Tensor(a!) y, Tensor(b!) last_state, Tensor(c!) chunk_states, Tensor(d!) saturation) -> ()");
  m.def(
      "selective_scan_general_bwd(Tensor grad_y, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B,"
      " Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? lower, Tensor? upper, Tensor chunk_states, int reverse_channels, bool softplus,"
      " int chunk, Tensor(a!) grad_u, Tensor(b!) grad_delta, Tensor(c!) grad_A, Tensor(d!) grad_B, Tensor(e!) grad_C,"
      " Tensor(f!) grad_D, Tensor(g!) grad_z, Tensor(h!) grad_bias, Tensor(i!) grad_initial_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("selective_scan_general_fwd", TORCH_BOX(&stablekern::selective_scan_general_fwd));
  m.impl("selective_scan_general_bwd", TORCH_BOX(&stablekern::selective_scan_general_bwd));
}
