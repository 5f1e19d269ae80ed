// Large blocks of memory that are kept when a tensor dies, for the next one of about that size. The system gives a new
// block out page by page, 0.25 ms for each MB on a virtual machine: a kernel that reaches the bandwidth of memory waits
// for that several times as long as it computes. Blocks are aligned to huge pages and ask for them, which would cost
// more than it brings if they were given back at once.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace stablekern {

class Pool {
 public:
  static constexpr size_t kGranule = size_t{2} << 20;  // a huge page

  // At least `bytes`, or null if the system has none left. Free blocks beyond `limit` bytes are given back from then on.
  void* acquire(size_t bytes, size_t limit) {
    const size_t wanted = (std::max(bytes, size_t{1}) + kGranule - 1) / kGranule * kGranule;
    {
      const std::lock_guard lock(mutex_);
      limit_ = limit;
      trim();
      // The smallest that is large enough and not wasteful; of equals the last one freed, which may still be in a cache.
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block)
        if (block->bytes >= wanted && block->bytes <= wanted + wanted / 4 + kGranule &&
            (best == free_.end() || block->bytes <= best->bytes))
          best = block;
      if (best != free_.end()) {
        const Block found = *best;
        free_.erase(best);
        held_ -= found.bytes;
        used_[found.data] = found.bytes;
        lent_ += found.bytes;
        return found.data;
      }
    }
    void* data = map(wanted);
    if (data == nullptr) {
      clear();
      data = map(wanted);
    }
    if (data == nullptr) return nullptr;
    const std::lock_guard lock(mutex_);
    used_[data] = wanted;
    lent_ += wanted;
    return data;
  }

  void release(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(data);
    free_.push_back({data, found->second});
    held_ += found->second;
    lent_ -= found->second;
    used_.erase(found);
    trim();
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    while (!free_.empty()) drop_oldest();
  }

  size_t held() {
    const std::lock_guard lock(mutex_);
    return held_;
  }
  size_t lent() {
    const std::lock_guard lock(mutex_);
    return lent_;
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  static void* map(size_t bytes) {
    // The system aligns to small pages: ask for one huge page more and return what sticks out on both sides.
    void* all = mmap(nullptr, bytes + kGranule, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    const auto start = reinterpret_cast<uintptr_t>(all);
    const uintptr_t aligned = (start + kGranule - 1) / kGranule * kGranule;
    if (aligned > start) munmap(all, aligned - start);
    munmap(reinterpret_cast<void*>(aligned + bytes), start + kGranule - aligned);
    void* data = reinterpret_cast<void*>(aligned);
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);  // a wish: where there are none, small pages do
#endif
    return data;
  }

  void drop_oldest() {
    munmap(free_.front().data, free_.front().bytes);
    held_ -= free_.front().bytes;
    free_.erase(free_.begin());
  }

  void trim() {
    while (held_ > limit_ && !free_.empty()) drop_oldest();
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // oldest first
  std::unordered_map<void*, size_t> used_;
  size_t limit_ = 0, held_ = 0, lent_ = 0;
};

// One for the process, never destroyed: tensors may outlive every static object.
inline Pool& pool() {
  static Pool* const the = new Pool;
  return *the;
}

}  // namespace stablekern
