// Symmetric matrices out of memory into the lanes of "stablekern/eigh_lanes.h".
#pragma once

#include <limits>

#include "stablekern/eigh_lanes.h"

namespace stablekern {

// One triangle of up to kLanes matrices, scaled to size 1, to the lower triangle of z; zeros for those with a non-finite
// entry in either triangle.
template <class T, int N, int Blocks>
void load_triangles(Workspace<T, N, Blocks>& w, int block, const T* matrices, int runtime_n, int count, bool upper) {
  const int n = N > 0 ? N : runtime_n;
  constexpr int stride = Workspace<T, N, Blocks>::kStride;
  Vec<T>* full = w.staging;
  gather_items(matrices, n * n, n * n, count, full);
  const Vec<T> zero{};
  Vec<T> largest{}, probe{};  // probe: NaN once an entry is not finite
  const int row = upper ? 1 : n, column = upper ? n : 1;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < i; ++j) {
      largest = max(abs(full[i * row + j * column]), largest);
      probe = fma(full[i * n + j], zero, probe);
      probe = fma(full[j * n + i], zero, probe);
    }
    largest = max(abs(full[i * n + i]), largest);
    probe = fma(full[i * n + i], zero, probe);
  }
  const Mask<T> finite = equal(probe, zero);
  const PowerOfTwo<T> power = power_of_two<T>(largest);
  w.non_finite[block] = !finite;
  w.up[block] = power.up;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j <= i; ++j)
      w.z[block][i * stride + j] = select(finite, full[i * row + j * column] * power.down, zero);
}

}  // namespace stablekern
