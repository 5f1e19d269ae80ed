// What a kernel that is bound by memory says to the caches.
#pragma once

#include <cstdint>

#include "stablekern/simd.h"

namespace stablekern {

constexpr int kLineBytes = 64;

// Fetches kBytes from `ahead` bytes beyond p on into the first cache, or with kCache = 2 into the second. The machine's
// own prefetching stops at each page of 4 KiB, and a kernel with long chains of dependent steps has too few loads in
// flight to wait for a line by itself. Nothing happens where there is no memory.
template <int kBytes, int kCache = 1>
SK_INLINE void prefetch(const void* p, int64_t ahead) {
  constexpr int kRead = 0, kLocality = 4 - kCache;
  for (int at = 0; at < kBytes; at += kLineBytes)
    __builtin_prefetch(static_cast<const char*>(p) + ahead + at, kRead, kLocality);
}

}  // namespace stablekern
