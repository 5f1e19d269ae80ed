// What a kernel that is bound by memory says to the caches.
#pragma once

#include <cstdint>

#include "stablekern/simd.h"

namespace stablekern {

constexpr int kLineBytes = 64;

// Fetches kBytes from `ahead` bytes beyond p on into the first cache. The machine's own prefetching stops at each page of
// 4 KiB, and a kernel with long chains of dependent steps has too few loads in flight to wait for a line by itself.
// Nothing happens where there is no memory.
template <int kBytes>
SK_INLINE void prefetch(const void* p, int64_t ahead) {
  for (int at = 0; at < kBytes; at += kLineBytes) __builtin_prefetch(static_cast<const char*>(p) + ahead + at);
}

}  // namespace stablekern
