// Whether many tensors are finite throughout, told from the bits of their numbers: nothing is summed, so nothing overflows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "stablekern/spans.h"

namespace stablekern {

constexpr int64_t kFiniteAlone = 1 << 18;  // numbers that one thread has read before another one is awake

// The bits of an infinity, sign aside, are the least that no finite number has.
template <class U>
bool finite_bits(const void* data, int64_t from, int64_t to, U infinity) {
  const U* p = static_cast<const U*>(data);
  const U magnitude = static_cast<U>(~U{0}) >> 1;
  U largest = 0;
  for (int64_t i = from; i < to; ++i) largest = std::max<U>(largest, p[i] & magnitude);
  return largest < infinity;
}

inline bool finite_part(const Span& span, int64_t from, int64_t to) {
  switch (span.type) {
    case SpanType::kFloat: return finite_bits<uint32_t>(span.data, from, to, 0x7f800000u);
    case SpanType::kDouble: return finite_bits<uint64_t>(span.data, from, to, 0x7ff0000000000000u);
    case SpanType::kBfloat16: return finite_bits<uint16_t>(span.data, from, to, 0x7f80u);
    case SpanType::kHalf: return finite_bits<uint16_t>(span.data, from, to, 0x7c00u);
    default: return false;  // complex numbers come as twice as many real ones, and integers do not come
  }
}

inline bool finite_throughout(const std::vector<Span>& spans) {
  int64_t total = 0;
  for (const Span& span : spans) total += span.size;
  if (total <= kFiniteAlone)
    return std::all_of(spans.begin(), spans.end(), [](const Span& span) { return finite_part(span, 0, span.size); });
  const Blocks blocks(spans);
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    blocks.visit(begin, end, false, [&](int64_t, const Span& span, int64_t from, int64_t to) {
      if (!finite_part(span, from, to)) good = false;
    });
  });
  return good;
}

}  // namespace stablekern
