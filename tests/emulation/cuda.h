// The built-in names of CUDA C++ on a CPU: enough to run a kernel of independent warps from its own source.
//
// The 32 lanes of a warp are fibers of one thread. Each runs until it meets the others in a shuffle, a vote or a
// `__syncwarp`; there all must arrive, with the same call, before any goes on. In between they run one after another,
// in an order that the caller chooses: a missing `__syncwarp` gives other results in another order, unless a shuffle or
// a vote stands in its place (which orders memory here, but not on the device). Shared memory holds NaN when a block
// starts.
#pragma once

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
#define __shared__ static __attribute__((section("emulated_shared")))

extern "C" __attribute__((visibility("hidden"))) char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStack = 1 << 16;

struct Index {
  unsigned x;
};

struct Meeting {
  const char* call = nullptr;
  int width = 0;
  unsigned long long value = 0;
};

struct Lane {
  ucontext_t context;
  jmp_buf position;
  Index thread;
  bool begun = false, running = false;
  Meeting meetings[2];  // the one before may still be read
  alignas(64) char stack[kStack];
};

// Each library of a kernel has its own.
static Lane lanes[kLanes];
static int current, round_parity;
static jmp_buf scheduler;
static Index block;
static void (*body)(void*);
static void* arguments;

[[noreturn]] static void fail(const char* what, const char* detail) {
  fprintf(stderr, "emulation: %s (%s)\n", what, detail);
  abort();
}

static void run_lane() {
  for (;;) {
    body(arguments);
    lanes[current].running = false;
    if (_setjmp(lanes[current].position) == 0) _longjmp(scheduler, 1);
  }
}

__attribute__((noinline)) static void resume(int lane) {
  current = lane;
  if (_setjmp(scheduler) != 0) return;
  Lane& l = lanes[lane];
  if (l.begun) _longjmp(l.position, 1);
  l.begun = true;
  getcontext(&l.context);
  l.context.uc_stack.ss_sp = l.stack;
  l.context.uc_stack.ss_size = kStack;
  makecontext(&l.context, run_lane, 0);
  setcontext(&l.context);
}

// All lanes arrive with a value; returns the place of it in `meetings`, this lane's and all others'.
__attribute__((noinline)) static int meet(const char* call, int width, unsigned long long value) {
  const int parity = round_parity;
  lanes[current].meetings[parity] = {call, width, value};
  if (_setjmp(lanes[current].position) == 0) _longjmp(scheduler, 1);
  return parity;
}

static void run_warp(int order) {
  const auto nth = [order](int i) { return order == 0 ? i : order == 1 ? kLanes - 1 - i : (i * 13 + 5) % kLanes; };
  for (Lane& lane : lanes) lane.running = true;
  for (;;) {
    int running = 0;
    for (int i = 0; i < kLanes; ++i) resume(nth(i));
    for (const Lane& lane : lanes) running += lane.running;
    if (running == 0) return;
    if (running != kLanes) fail("some lanes have returned and others wait", "divergence");
    const Meeting& first = lanes[0].meetings[round_parity];
    for (const Lane& lane : lanes) {
      const Meeting& one = lane.meetings[round_parity];
      if (one.call != first.call || one.width != first.width) fail(first.call, one.call);
    }
    round_parity ^= 1;
  }
}

template <class Kernel>
void launch(int order, long long blocks, int threads, Kernel& kernel) {
  body = [](void* k) { (*static_cast<Kernel*>(k))(); };
  arguments = &kernel;
  for (long long b = 0; b < blocks; ++b) {
    block.x = static_cast<unsigned>(b);
    memset(__start_emulated_shared, 0xff, static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
    for (int warp = 0; warp < threads / kLanes; ++warp) {
      for (int i = 0; i < kLanes; ++i) lanes[i].thread.x = static_cast<unsigned>(warp * kLanes + i);
      run_warp(order);
    }
  }
  arguments = nullptr;
}

template <class T>
T exchange(const char* call, T value, int source, int width) {
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const int parity = meet(call, width, bits);
  memcpy(&value, &lanes[source].meetings[parity].value, sizeof(T));
  return value;
}

constexpr char kShuffle[] = "__shfl_sync", kShuffleXor[] = "__shfl_xor_sync", kBallot[] = "__ballot_sync",
               kSync[] = "__syncwarp";

}  // namespace emulation

#define threadIdx (emulation::lanes[emulation::current].thread)
#define blockIdx (emulation::block)

inline void __syncwarp() { emulation::meet(emulation::kSync, 0, 0); }

template <class T>
T __shfl_sync(unsigned, T value, int source, int width) {
  const int base = emulation::current / width * width;
  return emulation::exchange(emulation::kShuffle, value, base + (source & (width - 1)), width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width) {
  return emulation::exchange(emulation::kShuffleXor, value, emulation::current ^ mask, width);
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const int parity = emulation::meet(emulation::kBallot, 0, flag);
  unsigned bits = 0;
  for (int i = 0; i < emulation::kLanes; ++i)
    bits |= static_cast<unsigned>(emulation::lanes[i].meetings[parity].value) << i;
  return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }

// Declared here, not by <cmath>: that header takes longer to read than a kernel takes to compile.
#define SK_MATH(name)                                         \
  inline float name(float x) { return __builtin_##name##f(x); } \
  inline double name(double x) { return __builtin_##name(x); }
#define SK_MATH_2(name)                                                    \
  inline float name(float x, float y) { return __builtin_##name##f(x, y); } \
  inline double name(double x, double y) { return __builtin_##name(x, y); }
namespace device {
SK_MATH(fabs)
SK_MATH(sqrt)
SK_MATH_2(copysign)
SK_MATH_2(fmax)
SK_MATH_2(hypot)
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float scalbn(float x, int n) { return __builtin_scalbnf(x, n); }
inline double scalbn(double x, int n) { return __builtin_scalbn(x, n); }
inline int ilogb(float x) { return __builtin_ilogbf(x); }
inline int ilogb(double x) { return __builtin_ilogb(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
// The device's approximation is allowed two ulp: here it has all of them, in the same direction.
inline float rsqrt_estimate(float x) { return (1.0f / sqrt(x)) * (1.0f + 0x1p-22f); }
inline double rsqrt(double x) { return (1.0 / sqrt(x)) * (1.0 + 0x1p-51); }
inline double nan(const char*) { return __builtin_nan(""); }
}  // namespace device
