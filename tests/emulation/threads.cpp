// torch's parallel_for on threads that ThreadSanitizer can follow, linked into the library by `tests/sanitize.py`.
// The OpenMP runtime that torch brings is not instrumented: its barriers would be invisible, and all that is handed
// from one thread to another a race. The grain is passed over, which only says when a thread pays off: small samples are
// shared out too.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace {
constexpr std::int64_t kThreads = 4;
thread_local bool inside = false;
}  // namespace

extern "C" __attribute__((visibility("hidden"))) std::int32_t torch_parallel_for(
    std::int64_t begin, std::int64_t end, std::int64_t /*grain*/, void (*body)(std::int64_t, std::int64_t, void*),
    void* context) {
  if (begin >= end) return 0;
  const std::int64_t count = inside ? 1 : std::min(kThreads, end - begin);
  const std::int64_t each = (end - begin + count - 1) / count;
  std::vector<std::exception_ptr> failed(count);
  const auto share = [&](std::int64_t index) {
    const std::int64_t from = begin + index * each, to = std::min(from + each, end);
    inside = true;
    try {
      if (from < to) body(from, to, context);
    } catch (...) {
      failed[index] = std::current_exception();
    }
  };
  if (count == 1) {
    const bool outer = inside;
    share(0);
    inside = outer;
  } else {
    std::vector<std::thread> threads;
    for (std::int64_t index = 0; index < count; ++index) threads.emplace_back(share, index);
    for (auto& thread : threads) thread.join();
  }
  for (const auto& failure : failed) {
    if (failure) std::rethrow_exception(failure);
  }
  return 0;
}
