// What kernels with one channel a lane share: blocks of lanes, their scratch memory, turning (channels, time) rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "stablekern/simd.h"

namespace stablekern {

// `count` rounded up to whole vectors.
template <class T>
constexpr int64_t padded_to_lanes(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// One allocation per thread, zeroed, handed out in cache lines.
class Arena {
 public:
  template <class V>
  void reserve(int64_t count) {
    bytes_ += padded(count * static_cast<int64_t>(sizeof(V)));
  }
  void allocate() {
    memory_.reset(new char[static_cast<size_t>(bytes_ + kLine)]());
    next_ = memory_.get() + (kLine - reinterpret_cast<uintptr_t>(memory_.get()) % kLine) % kLine;
  }
  template <class V>
  V* take(int64_t count) {
    char* here = next_;
    next_ += padded(count * static_cast<int64_t>(sizeof(V)));
    return reinterpret_cast<V*>(here);
  }

 private:
  static constexpr int64_t kLine = 64;
  static int64_t padded(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
  std::unique_ptr<char[]> memory_;
  char* next_ = nullptr;
  int64_t bytes_ = 0;
};

// Lanes of block `w` out of the `count` channels at `p`.
template <class T>
SK_INLINE Vec<T> load_block(const T* p, int w, int64_t count) {
  const int64_t left = count - w * kLanes<T>;
  return left >= kLanes<T> ? load(p + w * kLanes<T>) : load_first(p + w * kLanes<T>, static_cast<int>(left));
}
template <class T>
SK_INLINE void store_block(T* p, Vec<T> v, int w, int64_t count) {
  const int64_t left = count - w * kLanes<T>;
  left >= kLanes<T> ? store(p + w * kLanes<T>, v) : store_first(p + w * kLanes<T>, v, static_cast<int>(left));
}

// The first `count` lanes the other way round.
template <class T>
SK_INLINE Vec<T> reversed(Vec<T> v, int64_t count) {
  IVec<T> from;
  for (int k = 0; k < kLanes<T>; ++k) from[k] = static_cast<typename VecTypes<T>::integer>(std::max<int64_t>(0, count - 1 - k));
  return permute<T>(v, from);
}

// `rows` <= kLanes rows of `columns` numbers, `stride` apart, to one vector a column, whose lanes are the rows (0 where
// there is none). `out` holds whole vectors: padded_to_lanes(columns), `apart` vectors from one to the next (negative: the
// first column is the last one there). What lies `ahead` of each row will be wanted next: rows are far apart, and the
// machine's own prefetch does not see a sequence in them.
template <class T>
SK_NOINLINE void load_turned(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t ahead, Vec<T>* out,
                             int64_t apart = 1) {
  for (int64_t k = 0; k < rows; ++k) __builtin_prefetch(from + k * stride + ahead, 0, 2);
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    const int here = static_cast<int>(std::min<int64_t>(kLanes<T>, columns - c));
    Vec<T> r[kLanes<T>];
    if (rows == kLanes<T> && here == kLanes<T>)
      for (int k = 0; k < kLanes<T>; ++k) r[k] = load(from + k * stride + c);
    else
      for (int k = 0; k < kLanes<T>; ++k) r[k] = k < rows ? load_first(from + k * stride + c, here) : Vec<T>{};
    transpose<T>(r);
    for (int k = 0; k < kLanes<T>; ++k) out[(c + k) * apart] = r[k];
  }
}
// The way back: lanes of v[columns] to rows.
template <class T>
SK_NOINLINE void store_turned(const Vec<T>* v, int64_t rows, int64_t columns, int64_t ahead, T* to, int64_t stride,
                              int64_t apart = 1) {
  for (int64_t k = 0; k < rows; ++k) __builtin_prefetch(to + k * stride + ahead, 1, 2);
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    const int here = static_cast<int>(std::min<int64_t>(kLanes<T>, columns - c));
    Vec<T> r[kLanes<T>];
    for (int k = 0; k < kLanes<T>; ++k) r[k] = v[(c + k) * apart];
    transpose<T>(r);
    if (rows == kLanes<T> && here == kLanes<T>)
      for (int k = 0; k < kLanes<T>; ++k) store(to + k * stride + c, r[k]);
    else
      for (int k = 0; k < rows; ++k) store_first(to + k * stride + c, r[k], here);
  }
}

}  // namespace stablekern
