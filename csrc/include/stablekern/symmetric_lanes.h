// Hermitian matrices out of memory into the lanes of "stablekern/eigh_lanes.h".
#pragma once

#include <limits>

#include "stablekern/eigh_lanes.h"

namespace stablekern {

// Complex items are moved as twice as many reals.
template <class T, class E>
void gather_elements(const T* items, int length, int count, E* out) {
  constexpr int parts = sizeof(E) / sizeof(Vec<T>);
  gather_items(items, parts * length, parts * length, count, reinterpret_cast<Vec<T>*>(out));
}

// One triangle of up to kLanes matrices, scaled to size 1, to the lower triangle of z; zeros for those with a non-finite
// entry in either triangle.
template <class S, int Blocks, class T = RealOf<S>>
void load_triangles(Workspace<S, Blocks>& w, int block, const T* matrices, int n, int count, bool upper) {
  constexpr int stride = Workspace<S, Blocks>::kStride;
  Element<S>* full = w.staging;
  gather_elements(matrices, n * n, count, full);
  const Vec<T> zero{};
  Vec<T> largest{}, probe{};  // probe: NaN once an entry is not finite
  const int row = upper ? 1 : n, column = upper ? n : 1;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < i; ++j) {
      largest = max(part_size(full[i * row + j * column]), largest);
      probe = probe_finite(full[i * n + j], probe_finite(full[j * n + i], probe));
    }
    largest = max(abs(real_part(full[i * n + i])), largest);
    probe = probe_finite(full[i * n + i], probe);
  }
  const Mask<T> finite = equal(probe, zero);
  const PowerOfTwo<T> power = power_of_two<T>(largest);
  w.non_finite[block] = !finite;
  w.up[block] = power.up;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < i; ++j) {
      const Element<S> scaled = full[i * row + j * column] * power.down;
      w.z[block][i * stride + j] = select(finite, upper ? conj(scaled) : scaled, Element<S>{});
    }
    w.z[block][i * stride + i] = element<S>(select(finite, real_part(full[i * n + i]) * power.down, zero));
  }
}

}  // namespace stablekern
