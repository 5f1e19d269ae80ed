// Conjugate gradients for sparse systems with one pattern: a system in each lane, so that an index is read once for all
// of them and no sum runs across lanes. Lanes are held by masks: one that is done keeps its bits while others go on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "stablekern/complex_simd.h"
#include "stablekern/krylov.h"
#include "stablekern/lanes.h"

namespace stablekern {

struct Pattern {
  const int64_t *crow, *col;
  int64_t n, nnz;
};

template <class T>
SK_INLINE IVec<T> lane_exponents(Vec<T> size) {
  const IVec<T> none{}, field = (IVec<T>)size >> Bits<T>::kMantissa;
  const IVec<T> k = (field < 1 ? none + 1 : field) - Bits<T>::kBias;
  return field < 2 * Bits<T>::kBias + 1 ? select_int<T>(greater(size, Vec<T>{}), k, none) : none;
}
template <class T>
SK_INLINE Vec<T> lane_powers(IVec<T> k) {
  return (Vec<T>)((k + Bits<T>::kBias) << Bits<T>::kMantissa);
}
// v 2^k in two factors, neither out of range where the product is not.
template <class T, class V>
SK_INLINE V lane_scaled(V v, IVec<T> k) {
  const IVec<T> half = k >> 1;
  return v * lane_powers<T>(half) * lane_powers<T>(k - half);
}
template <class V>
SK_INLINE V quotient(V a, V b) {
  return a / b;
}
template <class T>
SK_INLINE ComplexVec<T> quotient(ComplexVec<T> a, ComplexVec<T> b) {
  return a * conj(b) / add_square(b, Vec<T>{});
}

// The vectors of a group of lanes, and its matrices: `values` and `blocks` have a system in each lane.
template <class S>
struct LaneRoom {
  Element<S>*values, *blocks, *b, *y, *r, *p, *q, *z, *step, *first_p, *first_q;

  static void reserve(Arena& arena, int64_t n, int64_t nnz, int64_t blocks) {
    for (const int64_t count : {nnz, blocks, n, n, n, n, n, n, n, n, n}) arena.reserve<Element<S>>(count);
  }
  LaneRoom(Arena& arena, int64_t n, int64_t nnz, int64_t blocks_count)
      : values(arena.take<Element<S>>(nnz)), blocks(arena.take<Element<S>>(blocks_count)) {
    for (auto row : {&b, &y, &r, &p, &q, &z, &step, &first_p, &first_q}) *row = arena.take<Element<S>>(n);
  }
};

// Element i of lane l.
template <class S>
SK_INLINE void set_lane(Element<S>* at, int64_t i, int lane, S value) {
  using T = RealOf<S>;
  T* parts = reinterpret_cast<T*>(at + i);
  if constexpr (kIsComplex<S>) {
    parts[lane] = value.real();
    parts[kLanes<T> + lane] = value.imag();
  } else {
    parts[lane] = value;
  }
}
template <class S>
SK_INLINE S get_lane(const Element<S>* at, int64_t i, int lane) {
  using T = RealOf<S>;
  const T* parts = reinterpret_cast<const T*>(at + i);
  if constexpr (kIsComplex<S>)
    return {parts[lane], parts[kLanes<T> + lane]};
  else
    return parts[lane];
}

template <class S, int kMethod>
struct LaneSolver {
  using T = RealOf<S>;
  using E = Element<S>;
  using Inner = std::conditional_t<kMethod == kSymmetric, E, Vec<T>>;
  static constexpr T kEpsilon = std::numeric_limits<T>::epsilon();

  const Pattern& pattern;
  const LaneRoom<S>& room;
  int64_t block;  // size of the preconditioner's, 0: none
  Vec<T> rtol, atol;
  typename VecTypes<T>::integer maxiter;
  T asymmetry;
  // What comes out, with `y` in the room.
  IVec<T> info, iterations;
  Vec<T> residual;

  static SK_INLINE Inner add_inner(E u, E v, Inner sum) {
    if constexpr (!kIsComplex<S> || kMethod == kSymmetric)
      return fma(u, v, sum);
    else
      return fma(u.im, v.im, fma(u.re, v.re, sum));
  }
  static SK_INLINE Vec<T> size_of(Inner a) {
    if constexpr (std::is_same_v<Inner, Vec<T>>)
      return abs(a);
    else
      return modulus(a);
  }
  SK_NOINLINE void product(const E* p, E* q) const {
    for (int64_t i = 0; i < pattern.n; ++i) {
      E sum{};
      for (int64_t t = pattern.crow[i]; t < pattern.crow[i + 1]; ++t) sum = fma(room.values[t], p[pattern.col[t]], sum);
      q[i] = sum;
    }
  }
  SK_NOINLINE void adjoint(const E* r, E* z) const {
    std::fill_n(z, pattern.n, E{});
    for (int64_t i = 0; i < pattern.n; ++i)
      for (int64_t t = pattern.crow[i]; t < pattern.crow[i + 1]; ++t) {
        E& sum = z[pattern.col[t]];
        sum = fma_conj(room.values[t], r[i], sum);
      }
  }
  Inner inner(const E* u, const E* v) const {
    Inner sum{};
    for (int64_t i = 0; i < pattern.n; ++i) sum = add_inner(u[i], v[i], sum);
    return sum;
  }
  Vec<T> square(const E* u) const {
    Vec<T> sum{};
    for (int64_t i = 0; i < pattern.n; ++i) sum = add_square(u[i], sum);
    return sum;
  }
  Vec<T> largest(const E* u, Vec<T>& probe) const {
    Vec<T> size{};
    for (int64_t i = 0; i < pattern.n; ++i) {
      size = max(part_size(u[i]), size);
      probe = probe_finite(u[i], probe);
    }
    return size;
  }
  // z from r, and its inner product with r, whose own square is rr.
  Inner direction(Vec<T> rr) const {
    if constexpr (kMethod == kAny) {
      adjoint(room.r, room.z);
      return rr;
    } else {
      if (block == 0)
        std::copy_n(room.r, pattern.n, room.z);
      else
        for (int64_t i = 0; i < pattern.n; ++i) {
          const int64_t first = i / block * block, last = std::min(first + block, pattern.n);
          E sum{};
          for (int64_t j = first; j < last; ++j) sum = fma(room.blocks[i * block + j - first], room.r[j], sum);
          room.z[i] = sum;
        }
      return inner(room.r, room.z);
    }
  }
  void take_residual() const {
    product(room.y, room.q);
    for (int64_t i = 0; i < pattern.n; ++i) room.r[i] = room.b[i] - room.q[i];
  }
  void add_info(Mask<T> lanes, int32_t bits) { info = select_int<T>(lanes, info | bits, info); }

  // From b, y (0 without a first guess) and values of size 1 in the room, all lanes; `known` is what fails before.
  void run(bool warm, Mask<T> zero, IVec<T> known) {
    const Vec<T> none{}, infinity = none + std::numeric_limits<T>::infinity();
    info = known;
    iterations = IVec<T>{};
    residual = none;
    const Vec<T> threshold = max(rtol * sqrt(square(room.b)), atol);
    Vec<T> before = infinity;
    Mask<T> waiting = equal_to<T>(info, 0) & !zero;
    if (warm)
      take_residual();
    else
      std::copy_n(room.b, pattern.n, room.r);
    for (bool first = true;; first = false) {
      Vec<T> probe{};
      const IVec<T> shift = lane_exponents<T>(largest(room.r, probe));
      for (int64_t i = 0; i < pattern.n; ++i) room.r[i] = lane_scaled<T>(room.r[i], -shift);
      Vec<T> rr = square(room.r);
      const Vec<T> norm = sqrt(rr), here = lane_scaled<T>(norm, shift);
      residual = select(waiting, here, residual);
      const Mask<T> done = waiting & less_equal(here, threshold);
      info = select_int<T>(done, IVec<T>{}, info);
      Mask<T> open = waiting & !done & equal_to<T>(info, 0);
      add_info(open & !greater_than<T>(IVec<T>{} + maxiter - iterations, 0), kMaxiter);
      open = open & equal_to<T>(info, 0);
      add_info(open & !less_equal(here, before * T(0.5)), kBreakdown);
      const Mask<T> running = open & equal_to<T>(info, 0);
      if (!any(running)) return;
      // A second start is there because rounding stood between the recurrence and the truth: it aims lower.
      const Vec<T> aim = select(less(before, infinity), threshold * T(0.25), threshold);
      before = select(running, here, before);
      const Vec<T> target = max(lane_scaled<T>(aim, -shift), norm * kEpsilon);
      iterate(running, rr, target * target, first);
      for (int64_t i = 0; i < pattern.n; ++i)
        room.y[i] = select(running, room.y[i] + lane_scaled<T>(room.step[i], shift), room.y[i]);
      take_residual();
      waiting = running;
    }
  }

  // The recurrence of the `active` lanes from r, until |r|^2 <= target, into the correction `step`.
  void iterate(Mask<T> active, Vec<T> rr, Vec<T> target, bool first) {
    const Vec<T> none{};
    // Without a preconditioner |alpha| |A| is at most the condition number (CGNE: its square): a longer step leads along
    // what A has no hold of.
    const Vec<T> longest = none + (block != 0             ? std::numeric_limits<T>::max()
                                   : kMethod == kAny ? T(1) / kEpsilon / kEpsilon
                                                     : T(1) / kEpsilon);
    Inner rz = direction(rr);
    std::copy_n(room.z, pattern.n, room.p);
    std::fill_n(room.step, pattern.n, E{});
    for (int count = 0; any(active); ++count) {
      product(room.p, room.q);
      if (first && kMethod != kAny && count < 2) {
        if (count == 1) active = active & !crooked(active);
        std::copy_n(room.p, pattern.n, room.first_p);
        std::copy_n(room.q, pattern.n, room.first_q);
      }
      Inner pq;
      if constexpr (kMethod == kAny)
        pq = square(room.p);
      else
        pq = inner(room.p, room.q);
      const Inner alpha = quotient(rz, pq);
      Mask<T> usable = less(size_of(alpha), longest);
      Mask<T> negative = none_set<T>();
      if constexpr (kMethod != kSymmetric) {
        usable = usable & greater(pq, none);
        if (kMethod == kHermitian) negative = less(pq, none);
      }
      add_info(active & !usable & negative, kIndefinite);
      add_info(active & !usable & !negative, kBreakdown);
      active = active & usable;
      for (int64_t i = 0; i < pattern.n; ++i) {
        room.step[i] = select(active, fma(alpha, room.p[i], room.step[i]), room.step[i]);
        room.r[i] = select(active, fma(-alpha, room.q[i], room.r[i]), room.r[i]);
      }
      iterations = select_int<T>(active, iterations + 1, iterations);
      rr = square(room.r);
      active = active & greater(rr, target) & greater_than<T>(IVec<T>{} + maxiter - iterations, 0);
      if (!any(active)) return;
      const Inner next = direction(rr);
      const Inner beta = quotient(next, rz);
      for (int64_t i = 0; i < pattern.n; ++i)
        room.p[i] = select(active, fma(beta, room.p[i], room.z[i]), room.p[i]);
      rz = next;
    }
  }

  // <p, A p'> and <A p, p'> are one number, but for rounding, if A is what it must be; p' lies where an asymmetry shows.
  Mask<T> crooked(Mask<T> active) {
    ComplexVec<T> gap{};
    const auto add = [&](E u, E v, T sign) {
      if constexpr (kIsComplex<S>) {
        const ComplexVec<T> term = kMethod == kSymmetric ? u * v : conj(u) * v;
        gap = gap + term * splat(sign);
      } else {
        gap.re = fma(u * splat(sign), v, gap.re);
      }
    };
    for (int64_t i = 0; i < pattern.n; ++i) {
      add(room.first_p[i], room.q[i], T(1));
      add(room.first_q[i], room.p[i], T(-1));
    }
    Vec<T> norm{};
    for (int64_t i = 0; i < pattern.n; ++i) {
      Vec<T> sum{};
      for (int64_t t = pattern.crow[i]; t < pattern.crow[i + 1]; ++t) sum = sum + modulus(room.values[t]);
      norm = max(sum, norm);
    }
    const Vec<T> limit = norm * asymmetry * sqrt(square(room.first_p)) * sqrt(square(room.p));
    const Mask<T> found = active & greater(modulus(gap), limit);
    add_info(found, kAsymmetric);
    return found;
  }
};

}  // namespace stablekern
