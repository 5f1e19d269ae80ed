// The linear recurrence with a clamp, and its adjoint; the mathematics is in stablekern/ops/linear_scan.py.
//
// Rows (batch, channel) are contiguous in time. A tile is as many steps of as many rows as a vector has elements; it is
// transposed in registers, so that lanes are rows and one step after the other advances all of them. Complex numbers
// stay pairs of lanes. With few rows the lanes of one tile are stretches of one row instead: the map that each stretch
// applies to its first state is composed, the first states follow one from the other, and then every stretch runs by
// itself. Where a map grows (or something overflows) its rounding could be worse than a loop's: those steps are looped.
//
// Which way a row goes depends on sizes and values alone, and a row is one task: no result depends on the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "stablekern/caches.h"
#include "stablekern/clamp.h"
#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/tensor.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kThreadWork = 1 << 15;           // steps of a row that are worth a thread
constexpr int64_t kStreamBytes = 2 * 1024 * 1024;  // larger than a core's L2: results would only displace inputs
constexpr int64_t kFewGroups = 4;                  // fewer groups of rows would leave threads idle
constexpr int64_t kComposedCost = 3;               // of a row by stretches, in rows of a full group
constexpr int64_t kTilesAhead = 3;                 // fetched into the first cache before they are read
constexpr int kStretchTiles = 4;                   // tiles in a stretch of time: what a block keeps fits the L1 cache

template <class T>
struct Problem {
  int64_t batch, channels, length;
  const T *gate, *token, *initial_state;
  const T *lower, *upper;  // (channels) or null
  int64_t first, some;     // channels that go in one direction, of each item: these rows are done

  int64_t rows() const { return batch * some; }
  int64_t row(int64_t k) const { return k / some * channels + first + k % some; }
};

// ---- elements -----------------------------------------------------------------------------------------------------

// What a kernel needs to know of its numbers: how many words T they have, their product, transpose and clamp, and how
// maps compose.
template <class Scalar>
struct Real {
  using T = Scalar;
  static constexpr int kWords = 1, kRows = kLanes<T>;
  static constexpr bool kClampComposes = true;
  using Factor = Vec<T>;

  static SK_INLINE void turn(Vec<T>* tile) { transpose<T>(tile); }
  static SK_INLINE Factor factor(Vec<T> a) { return a; }
  static SK_INLINE Factor conjugate(Vec<T> a) { return a; }
  static SK_INLINE Vec<T> multiply(Factor a, Vec<T> x) { return a * x; }
  static SK_INLINE Vec<T> multiply_add(Factor a, Vec<T> x, Vec<T> b) { return fma(a, x, b); }
  static SK_INLINE Mask<T> shrinks(Vec<T> a) { return less_equal(abs(a), splat<T>(1)); }

  struct Bounds {
    Vec<T> lower, upper;
  };
  static Bounds bounds(const Problem<T>& p, const int64_t* rows) {
    Bounds b{};
    for (int i = 0; i < kRows && p.upper; ++i)
      b.lower[i] = p.lower[rows[i] % p.channels], b.upper[i] = p.upper[rows[i] % p.channels];
    return b;
  }
  static SK_INLINE Vec<T> clamp(Vec<T> y, const Bounds& b) {
    return min(b.upper, max(b.lower, y));  // NaN, the second operand, passes
  }
  // Where the clamp changes y.
  static SK_INLINE Mask<T> outside(Vec<T> y, const Bounds& b) { return less(y, b.lower) | less(b.upper, y); }
  // Where y is on a bound by itself, so that the clamped state does not tell that it was not clamped.
  static constexpr bool kTies = true;
  static SK_INLINE Mask<T> ties(Vec<T> y, const Bounds& b) { return equal(y, b.lower) | equal(y, b.upper); }
  static SK_INLINE Mask<T> may_be_clamped(Vec<T> h, const Bounds& b) { return !(less(b.lower, h) & less(h, b.upper)); }
  // What the way back through the clamp depends on: of y, or of h where that tells all.
  using Passage = Mask<T>;
  static SK_INLINE Passage passage(Vec<T> y, const Bounds& b) { return less_equal(b.lower, y) & less_equal(y, b.upper); }
  static SK_INLINE Passage passage_by_state(Vec<T> h, const Bounds& b) { return !may_be_clamped(h, b); }
  static SK_INLINE Passage choose(Mask<T> m, Passage yes, Passage no) { return (m & yes) | (!m & no); }
  static SK_INLINE Vec<T> through_clamp(Vec<T> grad, Passage passes, const Bounds&) { return select(passes, grad, Vec<T>{}); }
};

template <class Scalar>
struct Complex {
  using T = Scalar;
  static constexpr int kWords = 2, kRows = kLanes<T> / 2;
  static constexpr bool kClampComposes = false;
  struct Factor {
    Vec<T> re, im;  // im has the signs with which it meets the exchanged parts
  };

  static SK_INLINE void turn(Vec<T>* tile) { transpose_pairs<T>(tile); }
  static SK_INLINE Vec<T> sign(int odd) {
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = i % 2 == odd ? -T(0) : T(0);
    return v;
  }
  static SK_INLINE Factor factor(Vec<T> a) { return {first_of_pairs<T>(a), flip_sign(second_of_pairs<T>(a), sign(0))}; }
  static SK_INLINE Factor conjugate(Vec<T> a) {
    return {first_of_pairs<T>(a), flip_sign(second_of_pairs<T>(a), sign(1))};
  }
  static SK_INLINE Vec<T> multiply(Factor a, Vec<T> x) { return fma(a.re, x, a.im * swap_pairs<T>(x)); }
  static SK_INLINE Vec<T> multiply_add(Factor a, Vec<T> x, Vec<T> b) {
    return fma(a.re, x, fma(a.im, swap_pairs<T>(x), b));
  }
  static SK_INLINE Vec<T> both(Vec<T> v) { return v + swap_pairs<T>(v); }
  static SK_INLINE Mask<T> shrinks(Vec<T> a) { return less_equal(both(a * a), splat<T>(1)); }

  struct Bounds {
    Vec<T> radius, inverse;
    Vec<T> usual;  // squares in units of the radius below it say how long y is
  };
  static Bounds bounds(const Problem<T>& p, const int64_t* rows) {
    Bounds b{};
    for (int i = 0; i < kLanes<T> && p.upper; ++i) {
      b.radius[i] = p.upper[rows[i / 2] % p.channels];
      b.inverse[i] = std::min(1 / b.radius[i], std::numeric_limits<T>::max());  // finite: 0 * inf would be NaN
      b.usual[i] = b.radius[i] < std::numeric_limits<T>::min() ? 0 : std::numeric_limits<T>::infinity();
    }
    return b;
  }
  // |y|^2 in units of the radius: overflows to inf only where y lies far outside.
  static SK_INLINE Vec<T> squared(Vec<T> y, const Bounds& b) {
    const Vec<T> scaled = y * b.inverse;
    return both(scaled * scaled);
  }
  struct Polar {
    Vec<T> unit, shrink;  // y / |y| and radius / |y|
  };
  // `square` is that of `squared`.
  static SK_INLINE Polar polar(Vec<T> y, Vec<T> square, const Bounds& b) {
    const Vec<T> shrink = reciprocal_sqrt(square), unit = y * b.inverse * shrink;
    const Mask<T> rare = !less(square, b.usual);
    if (__builtin_expect(!any(rare), true)) return {unit, shrink};
    const Vec<T> largest = max(abs(y), abs(swap_pairs<T>(y))), scaled = y / largest;
    const Vec<T> length = sqrt(both(scaled * scaled));
    return {select(rare, scaled / length, unit), select(rare, b.radius / largest / length, shrink)};
  }
  static SK_INLINE Mask<T> beyond(Vec<T> square) { return greater(square, splat<T>(1)); }
  static SK_INLINE Mask<T> outside(Vec<T> y, const Bounds& b) { return beyond(squared(y, b)); }
  static SK_INLINE Vec<T> clamp(Vec<T> y, const Bounds& b) {
    const Vec<T> square = squared(y, b);
    const Mask<T> far = beyond(square);
    if (__builtin_expect(any(far), false)) y = select(far, polar(y, square, b).unit * b.radius, y);
    return y;
  }
  static constexpr bool kTies = false;  // what passes depends on y itself
  // The modulus of what was clamped is the radius to a few ulp.
  static SK_INLINE Mask<T> may_be_clamped(Vec<T> h, const Bounds& b) {
    constexpr T kAlmostOne = 1 - 16 * std::numeric_limits<T>::epsilon();
    return !less(squared(h, b), splat<T>(kAlmostOne));
  }
  using Passage = Vec<T>;
  static SK_INLINE Passage passage(Vec<T> y, const Bounds&) { return y; }
  static SK_INLINE Passage passage_by_state(Vec<T> h, const Bounds&) { return h; }
  static SK_INLINE Passage choose(Mask<T> m, Passage yes, Passage no) { return select(m, yes, no); }
  static SK_INLINE Vec<T> through_clamp(Vec<T> grad, Passage y, const Bounds& b) {
    const Vec<T> square = squared(y, b);
    const Mask<T> far = beyond(square);
    if (!any(far)) return grad;
    const Polar n = polar(y, square, b);
    return select(far, n.shrink * fma(-n.unit, both(n.unit * grad), grad), grad);
  }
};

// ---- tiles --------------------------------------------------------------------------------------------------------

// The rows of a tile: lane i is row `row[i]` in memory, whose step 0 is element `offset[i]`. Lanes from `count` on repeat
// the last row, and are not stored.
template <class F, class T = typename F::T>
struct Rows {
  int count;
  int64_t row[F::kRows], offset[F::kRows];

  Rows(const Problem<T>& p, int64_t first, int count_) : count(count_) {
    for (int i = 0; i < F::kRows; ++i) row[i] = p.row(first + std::min(i, count - 1)), offset[i] = row[i] * p.length;
  }
  // Lanes are stretches of one row, `steps` long.
  static Rows stretches(const Problem<T>& p, int64_t row, int64_t start, int64_t steps) {
    Rows r(p, row, 1);
    r.count = F::kRows;
    for (int i = 0; i < F::kRows; ++i) r.offset[i] += start + i * steps;
    return r;
  }
};

// Elements at..at + width - 1 of each row, turned: step k of all rows in tile[k]. Tiles further on, or further back if
// kDown, are fetched: so many rows at once are more than the machine follows by itself.
template <class F, bool kDown, class T = typename F::T>
SK_INLINE void load_tile(const T* from, const Rows<F>& rows, int64_t at, int width, Vec<T>* tile) {
  if (width == F::kRows)
    for (int i = 0; i < F::kRows; ++i) {
      const T* row = from + (rows.offset[i] + at) * F::kWords;
      prefetch<kVectorBytes>(row, (kDown ? -kTilesAhead : kTilesAhead) * kVectorBytes);
      tile[i] = load(row);
    }
  else
    for (int i = 0; i < F::kRows; ++i) tile[i] = load_first(from + (rows.offset[i] + at) * F::kWords, width * F::kWords);
  F::turn(tile);
}
template <class F, class T = typename F::T>
SK_INLINE void store_tile(Vec<T>* tile, const Rows<F>& rows, int64_t at, int width, bool past_caches, T* to) {
  F::turn(tile);
  if (width == F::kRows && past_caches)
    for (int i = 0; i < rows.count; ++i) stream<T>(to + (rows.offset[i] + at) * F::kWords, tile[i]);
  else if (width == F::kRows)
    for (int i = 0; i < rows.count; ++i) store(to + (rows.offset[i] + at) * F::kWords, tile[i]);
  else
    for (int i = 0; i < rows.count; ++i) store_first(to + (rows.offset[i] + at) * F::kWords, tile[i], width * F::kWords);
}

// f(step) for the steps of a tile, the last one first if kDown.
template <class F, bool kDown, class Step>
SK_INLINE void each_step(int width, const Step& f) {
  if (width == F::kRows) {
#pragma GCC unroll 16
    for (int k = 0; k < F::kRows; ++k) f(kDown ? F::kRows - 1 - k : k);
  } else {
    for (int k = 0; k < width; ++k) f(kDown ? width - 1 - k : k);
  }
}
// f(first step, steps) for the tiles from `begin` to `end`, the last one first if kDown.
template <class F, bool kDown, class Visit>
SK_INLINE void each_tile(int64_t begin, int64_t end, const Visit& f) {
  const int64_t count = (end - begin + F::kRows - 1) / F::kRows;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t at = begin + (kDown ? count - 1 - n : n) * F::kRows;
    f(at, static_cast<int>(std::min<int64_t>(F::kRows, end - at)));
  }
}

// One number per row, of `from` (rows), or 0.
template <class F, class T = typename F::T>
SK_INLINE Vec<T> gather(const T* from, const Rows<F>& rows) {
  Vec<T> v{};
  for (int i = 0; from && i < kLanes<T>; ++i) v[i] = from[rows.row[i / F::kWords] * F::kWords + i % F::kWords];
  return v;
}

// The map of one stretch of time, x -> clip(scale x + shift, lower, upper), and its application to one row's state
// from lane to lane: `state` becomes the state after all lanes, `starts` those before each.
template <class F, bool kClamp>
struct Map {
  using T = typename F::T;
  Vec<T> scale, shift, lower, upper;

  explicit Map(const typename F::Bounds& b) : scale{}, shift{} {
    for (int i = 0; i < kLanes<T>; i += F::kWords) scale[i] = 1;
    if constexpr (kClamp) lower = b.lower, upper = b.upper;
  }
  SK_INLINE void then(typename F::Factor a, Vec<T> b, const typename F::Bounds& bounds) {
    scale = F::multiply(a, scale);
    shift = F::multiply_add(a, shift, b);
    if constexpr (kClamp) {
      const Vec<T> one = F::clamp(fma(a, lower, b), bounds), other = F::clamp(fma(a, upper, b), bounds);
      lower = min(one, other), upper = max(one, other);  // exchanged where a < 0
    }
  }
  // Whether it may be used for all lanes: nothing grows, and all is finite.
  bool usable() const {
    const Vec<T> most = splat<T>(std::numeric_limits<T>::max());
    Mask<T> good = F::shrinks(scale) & less_equal(abs(shift), most);
    if constexpr (kClamp) good = good & less_equal(lower, upper);
    return !any(!good);
  }
  template <bool kDown>
  Vec<T> starts(T* state) const {
    Vec<T> found{};
    for (int n = 0; n < F::kRows; ++n) {
      const int i = (kDown ? F::kRows - 1 - n : n) * F::kWords;
      if constexpr (F::kWords == 1) {
        found[i] = state[0];
        state[0] = scale[i] * state[0] + shift[i];
        if constexpr (kClamp) state[0] = std::min(std::max(state[0], T(lower[i])), T(upper[i]));
      } else {
        const T re = state[0], im = state[1];
        found[i] = re, found[i + 1] = im;
        state[0] = scale[i] * re - scale[i + 1] * im + shift[i];
        state[1] = scale[i] * im + scale[i + 1] * re + shift[i + 1];
      }
    }
    return found;
  }
};

// ---- forward ------------------------------------------------------------------------------------------------------

template <class F, bool kReverse, Clamp kClamp>
struct Forward {
  using T = typename F::T;
  using Bounds = typename F::Bounds;
  static constexpr bool kBounded = kClamp != Clamp::kNone;
  const Problem<T>& p;
  T* states;
  bool past_caches;
  int64_t* changed;  // (rows in memory) how many states the clamp has changed, if that is counted
  bool* ties;        // (rows in memory) whether one was on a bound by itself

  struct Seen {  // of the clamp's work, by lanes
    IVec<T> changed{};
    Mask<T> ties = none_set<T>();
  };

  // A tile: `state` goes on, and `token` becomes what it was after each step.
  static SK_INLINE void advance(const Vec<T>* gate, Vec<T>* token, int width, Vec<T>& state, const Bounds& bounds,
                                Seen& seen) {
    each_step<F, kReverse>(width, [&](int k) {
      state = F::multiply_add(F::factor(gate[k]), state, token[k]);
      if constexpr (kClamp == Clamp::kCount)
        seen.changed += select_int<T>(F::outside(state, bounds), IVec<T>{} + 1, IVec<T>{});
      if constexpr (kBounded && F::kTies) seen.ties = seen.ties | F::ties(state, bounds);
      if constexpr (kBounded) state = F::clamp(state, bounds);
      token[k] = state;
    });
  }
  void add(const Rows<F>& rows, const Seen& seen) const {
    if constexpr (kClamp == Clamp::kCount)
      for (int i = 0; i < rows.count; ++i) changed[rows.row[i]] += seen.changed[i * F::kWords];
    if constexpr (kBounded && F::kTies)
      for (uint32_t lanes = lane_bits<T>(seen.ties), i = 0; lanes >> i; ++i)
        if (lanes >> i & 1) ties[rows.row[i]] = true;
  }

  // Steps begin..end - 1 of all rows, step by step; the state after them.
  Vec<T> loop(const Rows<F>& rows, int64_t begin, int64_t end, Vec<T> state) const {
    if (begin == end) return state;
    const Bounds bounds = F::bounds(p, rows.row);
    Seen seen;
    each_tile<F, kReverse>(begin, end, [&](int64_t at, int width) {
      Vec<T> gate[F::kRows], token[F::kRows];
      load_tile<F, kReverse>(p.gate, rows, at, width, gate);
      load_tile<F, kReverse>(p.token, rows, at, width, token);
      advance(gate, token, width, state, bounds, seen);
      store_tile<F>(token, rows, at, width, past_caches, states);
    });
    add(rows, seen);
    return state;
  }

  // Stretches of kStretch steps of one row in parallel, from step `begin` on; false if the maps are not usable.
  bool stretches(int64_t row, int64_t begin, T* state) const {
    constexpr int kStretch = kStretchTiles * F::kRows;
    const Rows<F> lanes = Rows<F>::stretches(p, row, begin, kStretch);
    const Bounds bounds = F::bounds(p, lanes.row);
    Vec<T> gate[kStretch], token[kStretch];
    Map<F, kBounded> map(bounds);
    each_tile<F, kReverse>(0, kStretch, [&](int64_t at, int width) {
      load_tile<F, kReverse>(p.gate, lanes, at, width, gate + at);
      load_tile<F, kReverse>(p.token, lanes, at, width, token + at);
      each_step<F, kReverse>(width, [&](int k) { map.then(F::factor(gate[at + k]), token[at + k], bounds); });
    });
    if (!map.usable()) return false;
    Vec<T> starts = map.template starts<kReverse>(state);
    Seen seen;
    each_tile<F, kReverse>(0, kStretch, [&](int64_t at, int width) {
      advance(gate + at, token + at, width, starts, bounds, seen);
      store_tile<F>(token + at, lanes, at, width, past_caches, states);
    });
    add(lanes, seen);
    return true;
  }
};

// ---- backward -----------------------------------------------------------------------------------------------------

template <class F, bool kReverse, bool kClamp>
struct Backward {
  using T = typename F::T;
  using Bounds = typename F::Bounds;
  static constexpr bool kDown = !kReverse;  // against the scan
  const Problem<T>& p;
  const T *grad_states, *states;
  T *grad_gate, *grad_token;
  const bool* ties;  // of the forward pass, or null where it has left none
  bool past_caches;

  // What a tile of the adjoint reads. `state` holds what the scan made of the tile, and `before` it.
  struct Tile {
    Vec<T> grad[F::kRows], gate[F::kRows], state[F::kRows];
    typename F::Passage passage[F::kRows];
    Vec<T> before;
    Mask<T> on_bound;  // rows with states that were clamped, perhaps; `passage` is there only if there are any

    SK_INLINE Vec<T> state_before(int k, int width) const {
      return kReverse ? (k == width - 1 ? before : state[k + 1]) : (k == 0 ? before : state[k - 1]);
    }
  };

  // Lanes whose clamped states do not tell how they were clamped.
  Mask<T> unsure(const Rows<F>& rows) const {
    Vec<T> lanes = splat<T>(1);
    for (int i = 0; F::kTies && ties && i < F::kRows; ++i) lanes[i] = ties[rows.row[i]];
    return greater(lanes, Vec<T>{});
  }
  // The states of `tile`. Tokens that they make necessary are few and far apart: they are under way before they are read.
  SK_INLINE void read_states(const Rows<F>& rows, int64_t at, int width, const Bounds& bounds, Mask<T> unsure,
                             Tile& tile) const {
    load_tile<F, kDown>(states, rows, at, width, tile.state);
    if constexpr (kClamp) {
      tile.on_bound = none_set<T>();
      each_step<F, kDown>(width, [&](int k) { tile.on_bound = tile.on_bound | F::may_be_clamped(tile.state[k], bounds); });
      const uint32_t wanted = lane_bits<T>(unsure & tile.on_bound);
      for (int i = 0; wanted >> i * F::kWords; ++i)
        if (wanted >> i * F::kWords & 1) prefetch<kVectorBytes>(p.token, (rows.offset[i] + at) * F::kWords * sizeof(T));
    }
  }
  // Fills `tile` but for its states, and the states of `next`, the tile that comes before it in the scan.
  SK_INLINE void read(const Rows<F>& rows, int64_t at, int width, Vec<T> initial_state, const Bounds& bounds, Mask<T> unsure,
                      Tile& tile, Tile& next) const {
    const int64_t beyond = kReverse ? at + width : at - F::kRows;
    load_tile<F, kDown>(grad_states, rows, at, width, tile.grad);
    load_tile<F, kDown>(p.gate, rows, at, width, tile.gate);
    if (rows.offset[0] + beyond >= rows.row[0] * p.length && rows.offset[F::kRows - 1] + beyond < last_end(rows)) {
      const int64_t left = last_end(rows) - rows.offset[F::kRows - 1] - beyond;
      read_states(rows, beyond, static_cast<int>(std::min<int64_t>(F::kRows, left)), bounds, unsure, next);
      tile.before = next.state[kReverse ? 0 : F::kRows - 1];
    } else {
      tile.before = initial_state;
    }
    if constexpr (kClamp) {
      if (!any(tile.on_bound)) return;
      each_step<F, kDown>(width, [&](int k) { tile.passage[k] = F::passage_by_state(tile.state[k], bounds); });
      unsure = unsure & tile.on_bound;
      if (const uint32_t wanted = lane_bits<T>(unsure)) {  // only rows that need it read their tokens
        Vec<T> token[F::kRows];
        for (int i = 0; i < F::kRows; ++i) {
          const T* from = p.token + (rows.offset[i] + at) * F::kWords;
          token[i] = wanted >> i * F::kWords & 1 ? load_first(from, width * F::kWords) : Vec<T>{};
        }
        F::turn(token);
        each_step<F, kDown>(width, [&](int k) {
          const Vec<T> free = F::multiply_add(F::factor(tile.gate[k]), tile.state_before(k, width), token[k]);
          tile.passage[k] = F::choose(unsure, F::passage(free, bounds), tile.passage[k]);
        });
      }
    }
  }
  // f(step, what the gradient becomes at the clamp), over a tile.
  template <class Step>
  static SK_INLINE void sweep(const Tile& tile, int width, const Bounds& bounds, const Step& f) {
    if (kClamp && any(tile.on_bound))
      each_step<F, kDown>(width, [&](int k) {
        f(k, [&](Vec<T> grad) { return F::through_clamp(grad, tile.passage[k], bounds); });
      });
    else
      each_step<F, kDown>(width, [&](int k) { f(k, [](Vec<T> grad) { return grad; }); });
  }
  SK_INLINE void write(Tile& tile, const Rows<F>& rows, int64_t at, int width, const Bounds& bounds, Vec<T>& carry) const {
    sweep(tile, width, bounds, [&](int k, const auto& clamp) {
      const Vec<T> grad = clamp(tile.grad[k] + carry);
      carry = F::multiply(F::conjugate(tile.gate[k]), grad);
      tile.grad[k] = grad;
      tile.gate[k] = F::multiply(F::conjugate(tile.state_before(k, width)), grad);
    });
    store_tile<F>(tile.grad, rows, at, width, past_caches, grad_token);
    store_tile<F>(tile.gate, rows, at, width, past_caches, grad_gate);
  }

  // Steps begin..end - 1 of all rows; what they pass on.
  Vec<T> loop(const Rows<F>& rows, int64_t begin, int64_t end, Vec<T> carry) const {
    if (begin == end) return carry;
    const Bounds bounds = F::bounds(p, rows.row);
    const Vec<T> initial_state = gather<F>(p.initial_state, rows);
    const Mask<T> unsure_lanes = unsure(rows);
    Tile tiles[2];
    bool first = true, turn = false;
    each_tile<F, kDown>(begin, end, [&](int64_t at, int width) {
      Tile &tile = tiles[turn], &next = tiles[!turn];
      if (first) read_states(rows, at, width, bounds, unsure_lanes, tile);
      read(rows, at, width, initial_state, bounds, unsure_lanes, tile, next);
      write(tile, rows, at, width, bounds, carry);
      first = false, turn = !turn;
    });
    return carry;
  }

  // As in the forward pass, for the linear map of `carry` that the gates and clamps of a stretch make. The row's first
  // tile in the scan may not be among them: before it there is nothing to load.
  bool stretches(int64_t row, int64_t begin, T* carry) const {
    constexpr int kStretch = kStretchTiles * F::kRows;
    const Rows<F> lanes = Rows<F>::stretches(p, row, begin, kStretch);
    const Bounds bounds = F::bounds(p, lanes.row);
    const Mask<T> unsure_lanes = unsure(lanes);
    Tile tiles[kStretchTiles + 2];  // one more at either end for `next`
    Map<F, false> map(bounds);
    read_states(lanes, kReverse ? 0 : kStretch - F::kRows, F::kRows, bounds, unsure_lanes,
                tiles[kReverse ? 1 : kStretchTiles]);
    each_tile<F, kDown>(0, kStretch, [&](int64_t at, int width) {
      Tile* tile = tiles + 1 + at / F::kRows;
      read(lanes, at, width, Vec<T>{}, bounds, unsure_lanes, *tile, tile[kReverse ? 1 : -1]);
      sweep(*tile, width, bounds, [&](int k, const auto& clamp) {
        const auto gate = F::conjugate(tile->gate[k]);
        map.scale = F::multiply(gate, clamp(map.scale));
        map.shift = F::multiply(gate, clamp(tile->grad[k] + map.shift));
      });
    });
    if (!map.usable()) return false;
    Vec<T> starts = map.template starts<kDown>(carry);
    each_tile<F, kDown>(0, kStretch, [&](int64_t at, int width) {
      write(tiles[1 + at / F::kRows], lanes, at, width, bounds, starts);
    });
    return true;
  }

 private:
  int64_t last_end(const Rows<F>& rows) const { return (rows.row[F::kRows - 1] + 1) * p.length; }
};

// ---- rows ---------------------------------------------------------------------------------------------------------

// A whole row, from its last step on if kDown: blocks of stretches, and what is left of it, or cannot be composed, in
// loops of a single row. `first` steps at its start and `last` at its end are looped. From state to state.
template <class F, bool kDown, class Pass, class T = typename F::T>
Vec<T> by_stretches(const Pass& pass, int64_t row, int64_t first, int64_t last, Vec<T> state) {
  constexpr int64_t kBlock = kStretchTiles * F::kRows * F::kRows;
  const Rows<F> alone(pass.p, row, 1);
  const int64_t length = pass.p.length, blocks = std::max<int64_t>(0, length - first - last) / kBlock;
  const int64_t end = first + blocks * kBlock;
  state = kDown ? pass.loop(alone, end, length, state) : pass.loop(alone, 0, first, state);
  for (int64_t n = 0; n < blocks; ++n) {
    const int64_t begin = first + (kDown ? blocks - 1 - n : n) * kBlock;
    T one[F::kWords];
    for (int i = 0; i < F::kWords; ++i) one[i] = state[i];
    if (pass.stretches(row, begin, one))
      for (int i = 0; i < F::kWords; ++i) state[i] = one[i];
    else
      state = pass.loop(alone, begin, begin + kBlock, state);
  }
  return kDown ? pass.loop(alone, 0, first, state) : pass.loop(alone, end, length, state);
}

// All rows, in groups of a vector's lanes, or one by one where there are few and stretches of time compose. `begin`
// (rows) is what goes in, `end` (rows) what comes out; either may be null.
template <class F, bool kDown, bool kComposes, class Pass, class T = typename F::T>
void over_rows(const Pass& pass, int64_t first, int64_t last, const T* begin, T* end) {
  constexpr int64_t kBlock = kStretchTiles * F::kRows * F::kRows;
  const int64_t count = pass.p.rows(), length = pass.p.length;
  const bool may_compose = kComposes && length - first - last >= kBlock;
  int64_t groups = count / F::kRows, rest = count % F::kRows;
  if (may_compose && groups < kFewGroups) groups = 0, rest = count;
  const bool one_by_one = may_compose && (groups == 0 || rest * kComposedCost <= F::kRows);
  const int64_t tasks = groups + (one_by_one ? rest : (rest > 0));
  const auto finish = [&](const Rows<F>& rows, Vec<T> v) {
    for (int i = 0; end && i < rows.count * F::kWords; ++i) end[rows.row[i / F::kWords] * F::kWords + i % F::kWords] = v[i];
  };
  const int64_t grain = kThreadWork / std::max<int64_t>(1, length * (groups ? F::kRows : 1)) + 1;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      if (task < groups || !one_by_one) {
        const int here = static_cast<int>(std::min<int64_t>(F::kRows, count - task * F::kRows));
        const Rows<F> rows(pass.p, task * F::kRows, here);
        finish(rows, pass.loop(rows, 0, length, gather<F>(begin, rows)));
      } else if constexpr (kComposes) {
        const int64_t row = groups * F::kRows + task - groups;
        const Rows<F> alone(pass.p, row, 1);
        finish(alone, by_stretches<F, kDown>(pass, row, first, last, gather<F>(begin, alone)));
      }
    }
    stream_fence();
  });
}

template <class F, bool kReverse, Clamp kClamp>
void forward(const Problem<typename F::T>& p, typename F::T* states, bool past_caches, int64_t* changed, bool* ties) {
  constexpr bool kComposes = kClamp == Clamp::kNone || F::kClampComposes;
  over_rows<F, kReverse, kComposes>(Forward<F, kReverse, kClamp>{p, states, past_caches, changed, ties}, 0, 0,
                                    p.initial_state, static_cast<typename F::T*>(nullptr));
}

template <class F, bool kReverse, bool kClamp, class T = typename F::T>
void backward(const Problem<T>& p, const T* grad_states, const T* states, const bool* ties, T* grad_gate, T* grad_token,
              T* grad_initial, bool past_caches) {
  constexpr bool kComposes = !kClamp || F::kClampComposes;
  const Backward<F, kReverse, kClamp> pass{p, grad_states, states, grad_gate, grad_token, ties, past_caches};
  // The tile at the scan's start has the initial state before it: not among the stretches.
  over_rows<F, !kReverse, kComposes>(pass, kReverse ? 0 : F::kRows, kReverse ? F::kRows : 0,
                                     static_cast<const T*>(nullptr), grad_initial);
}

// ---- tensors ------------------------------------------------------------------------------------------------------

// f(Real<T>{} or Complex<T>{}, is there a clamp, do these channels go backwards, the first of them, how many), for each
// direction that some go in: the last `reverse_channels` go backwards.
template <class F>
void for_directions(const Tensor& like, int64_t reverse_channels, bool clamp, const F& f) {
  using std::false_type, std::true_type;
  const int64_t ahead = like.size(1) - reverse_channels;
  const auto of_element = [&](auto element) {
    const auto with_clamp = [&](auto clamps) {
      if (ahead > 0) f(element, clamps, false_type{}, int64_t{0}, ahead);
      if (reverse_channels > 0) f(element, clamps, true_type{}, ahead, reverse_channels);
    };
    clamp ? with_clamp(true_type{}) : with_clamp(false_type{});
  };
  using torch::headeronly::ScalarType;
  switch (like.scalar_type()) {
    case ScalarType::Float: return of_element(Real<float>{});
    case ScalarType::Double: return of_element(Real<double>{});
    case ScalarType::ComplexFloat: return of_element(Complex<float>{});
    default: return of_element(Complex<double>{});
  }
}

// Whether whole tiles of these outputs start at multiples of a vector, and are better not kept in the caches.
template <class F>
bool streams(const Tensor& like, std::initializer_list<const void*> outputs) {
  const int64_t bytes = sizeof(typename F::T) * F::kWords;
  return like.numel() * bytes > kStreamBytes && like.size(2) * bytes % kVectorBytes == 0 &&
         std::all_of(outputs.begin(), outputs.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; });
}

template <class T>
Problem<T> problem(const Tensor& gate, const std::optional<Tensor>& token, const std::optional<Tensor>& initial_state,
                   const std::optional<Tensor>& lower, const std::optional<Tensor>& upper, int64_t first, int64_t some) {
  return {gate.size(0),   gate.size(1),           gate.size(2),   data<T>(gate),  data<T>(token),
          data<T>(initial_state), data<T>(lower), data<T>(upper), first,          some};
}

void linear_scan_fwd(const Tensor gate, const Tensor token, const std::optional<Tensor> initial_state,
                     const std::optional<Tensor> lower, const std::optional<Tensor> upper, int64_t reverse_channels, bool count,
                     Tensor states, Tensor saturation, Tensor ties) {
  std::vector<int64_t> changed(count ? gate.size(0) * gate.size(1) : 0);
  bool* tied = mutable_data<bool>(ties);
  std::fill(tied, tied + ties.numel(), false);
  for_directions(gate, reverse_channels, upper.has_value(), [&]<class F>(F, auto clamp, auto backwards, int64_t first, int64_t some) {
    using T = typename F::T;
    T* to = mutable_data<T>(states);
    const auto p = problem<T>(gate, token, initial_state, lower, upper, first, some);
    constexpr bool kBack = backwards.value;
    if constexpr (clamp.value) {
      const auto run = count ? forward<F, kBack, Clamp::kCount> : forward<F, kBack, Clamp::kApply>;
      run(p, to, streams<F>(gate, {to}), changed.data(), tied);
    } else {
      forward<F, kBack, Clamp::kNone>(p, to, streams<F>(gate, {to}), nullptr, nullptr);
    }
  });
  const double length = static_cast<double>(std::max<int64_t>(1, gate.size(2)));
  for_dtype(saturation, [&]<class T>(T) {
    for (size_t row = 0; row < changed.size(); ++row)
      mutable_data<T>(saturation)[row] = static_cast<T>(static_cast<double>(changed[row]) / length);
  });
}

void linear_scan_bwd(const Tensor grad_states, const Tensor gate, const std::optional<Tensor> token, const Tensor states,
                     const std::optional<Tensor> initial_state, const std::optional<Tensor> lower,
                     const std::optional<Tensor> upper, const Tensor ties, int64_t reverse_channels,
                     Tensor grad_gate, Tensor grad_token, Tensor grad_initial_state) {
  const bool* tied = ties.numel() > 0 ? data<bool>(ties) : nullptr;
  for_directions(gate, reverse_channels, upper.has_value(), [&]<class F>(F, auto clamp, auto backwards, int64_t first, int64_t some) {
    using T = typename F::T;
    T *to_gate = mutable_data<T>(grad_gate), *to_token = mutable_data<T>(grad_token);
    backward<F, backwards.value, clamp.value>(problem<T>(gate, token, initial_state, lower, upper, first, some), data<T>(grad_states),
                                              data<T>(states), tied, to_gate, to_token, mutable_data<T>(grad_initial_state),
                                              streams<F>(gate, {to_gate, to_token}));
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "linear_scan_fwd(Tensor gate, Tensor token, Tensor? initial_state, Tensor? lower, Tensor? upper, int reverse_channels,"
      " bool count, Tensor(a!) states, Tensor(b!) saturation, Tensor(c!) ties) -> ()");
  m.def(
      "linear_scan_bwd(Tensor grad_states, Tensor gate, Tensor? token, Tensor states, Tensor? initial_state,"
      " Tensor? lower, Tensor? upper, Tensor ties, int reverse_channels, Tensor(a!) grad_gate, Tensor(b!) grad_token,"
      " Tensor(c!) grad_initial_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("linear_scan_fwd", TORCH_BOX(&stablekern::linear_scan_fwd));
  m.impl("linear_scan_bwd", TORCH_BOX(&stablekern::linear_scan_bwd));
}
