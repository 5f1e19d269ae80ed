// Sparse symmetric adjacency matrices from the weights of all pairs, and the way back; the selection is defined in
// stablekern/ops/assemble_adjacency.py.
//
// The lanes are time steps, so that the weights load as they lie and nothing depends on data but masks. A weight is
// compared as an integer: 0 if the threshold drops it, else its bits, whose order is that of positive numbers, with NaN
// above infinity. The k-th largest key of a row comes from k running maxima; a second pass over the row picks what is
// above it, and of what equals it the first, as many as there are places left. The graphs leave by transposes of
// kLanes entries of kLanes graphs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "stablekern/simd.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 4;  // blocks of steps that are worth a thread

template <class T>
using Bytes __attribute__((vector_size(kLanes<T>))) = uint8_t;

struct Sizes {
  int64_t batch, pairs, steps, nodes;

  template <class T>
  int64_t blocks() const {
    return (steps + kLanes<T> - 1) / kLanes<T>;
  }
};

// For each entry of a matrix the number of its pair; for the diagonal the number past the last one.
std::vector<int32_t> pair_numbers(int64_t nodes) {
  std::vector<int32_t> numbers(nodes * nodes, static_cast<int32_t>(nodes * (nodes - 1) / 2));
  int32_t next = 0;
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t j = i + 1; j < nodes; ++j) numbers[i * nodes + j] = numbers[j * nodes + i] = next++;
  return numbers;
}

// `block(item, t0, count, scratch)` for each stretch of kLanes steps.
template <class T, class Scratch, class Block>
void for_each_block(const Sizes& sizes, const Block& block) {
  const int64_t blocks = sizes.blocks<T>();
  torch::stable::parallel_for(0, sizes.batch * blocks, kGrain, [&](int64_t begin, int64_t end) {
    Scratch scratch(sizes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task % blocks * kLanes<T>;
      block(task / blocks, t0, static_cast<int>(std::min<int64_t>(kLanes<T>, sizes.steps - t0)), scratch);
    }
  });
}

// The first `count` lanes, as bytes; no memory beyond them is touched.
template <class T>
SK_INLINE IVec<T> load_bytes(const uint8_t* from, int count) {
  Bytes<T> bytes{};
  if (count == kLanes<T>)
    __builtin_memcpy(&bytes, from, kLanes<T>);
  else
    __builtin_memcpy(&bytes, from, count);
  return __builtin_convertvector(bytes, IVec<T>);
}
template <class T>
SK_INLINE void store_bytes(uint8_t* to, IVec<T> v, int count) {
  const Bytes<T> bytes = __builtin_convertvector(v, Bytes<T>);
  if (count == kLanes<T>)
    __builtin_memcpy(to, &bytes, kLanes<T>);
  else
    __builtin_memcpy(to, &bytes, count);
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardScratch {
  std::vector<Vec<T>> weights;  // one more than the pairs: 0, for the diagonal
  std::vector<IVec<T>> keys, largest;
  std::vector<Mask<T>> by_first, by_second;  // which end of a pair picks it

  explicit ForwardScratch(const Sizes& s)
      : weights(s.pairs + 1), keys(s.pairs), largest(s.nodes), by_first(s.pairs), by_second(s.pairs) {}
};

template <class T>
SK_INLINE IVec<T> key_of(Vec<T> w, Vec<T> threshold) {
  const IVec<T> nan = (IVec<T>)splat(std::numeric_limits<T>::quiet_NaN());
  const IVec<T> bits = select_int<T>(equal(w, w), (IVec<T>)w, nan);
  return select_int<T>(less_equal(w, threshold), IVec<T>{}, bits);
}

// The picks of node i. kTop = 0: any number of places, kept in memory.
template <class T, int kTop>
SK_INLINE void pick(const int32_t* numbers, int64_t nodes, int64_t i, int64_t top, ForwardScratch<T>& scratch) {
  const IVec<T>* keys = scratch.keys.data();
  IVec<T> own[kTop ? kTop : 1];
  IVec<T>* largest = kTop ? own : scratch.largest.data();
  const int64_t places = kTop ? kTop : top;
  for (int64_t l = 0; l < places; ++l) largest[l] = IVec<T>{};
  for (int64_t j = 0; j < nodes; ++j) {
    if (j == i) continue;
    IVec<T> key = keys[numbers[j]];
    for (int64_t l = 0; l < places; ++l) {
      const IVec<T> high = largest[l] > key ? largest[l] : key;
      key = largest[l] > key ? key : largest[l];
      largest[l] = high;
    }
  }
  const IVec<T> bar = largest[places - 1];
  IVec<T> left{};  // places for what equals the bar
  for (int64_t l = 0; l < places; ++l) left -= largest[l] == bar;
  const Mask<T> counts = greater_than<T>(bar, 0);
  for (int64_t j = 0; j < nodes; ++j) {
    if (j == i) continue;
    const IVec<T> key = keys[numbers[j]];
    const Mask<T> equals = equal_int<T>(key, bar) & counts & greater_than<T>(left, 0);
    left = select_int<T>(equals, left - 1, left);
    (j > i ? scratch.by_first : scratch.by_second)[numbers[j]] = greater_than<T>(key - bar, 0) | equals;
  }
}

template <class T, int kTop>
void pick_all(const std::vector<int32_t>& numbers, int64_t nodes, int64_t top, ForwardScratch<T>& scratch) {
  for (int64_t i = 0; i < nodes; ++i) pick<T, kTop>(numbers.data() + i * nodes, nodes, i, top, scratch);
}

template <class T>
void forward(const Sizes& sizes, const T* weights, int64_t top, T threshold, T* adjacency, uint8_t* picks) {
  constexpr int lanes = kLanes<T>;
  const int64_t n = sizes.nodes, entries = n * n;
  const std::vector<int32_t> numbers = pair_numbers(n);
  for_each_block<T, ForwardScratch<T>>(sizes, [&](int64_t b, int64_t t0, int count, ForwardScratch<T>& scratch) {
    const int64_t first = b * sizes.pairs * sizes.steps + t0;
    for (int64_t e = 0; e < sizes.pairs; ++e) {
      scratch.weights[e] = load_first(weights + first + e * sizes.steps, count);
      scratch.keys[e] = key_of<T>(scratch.weights[e], splat(threshold));
    }
    if (top >= n - 1)
      for (int64_t e = 0; e < sizes.pairs; ++e)
        scratch.by_first[e] = scratch.by_second[e] = greater_than<T>(scratch.keys[e], 0);
    else if (top == 1)
      pick_all<T, 1>(numbers, n, top, scratch);
    else if (top == 2)
      pick_all<T, 2>(numbers, n, top, scratch);
    else if (top == 3)
      pick_all<T, 3>(numbers, n, top, scratch);
    else
      pick_all<T, 0>(numbers, n, top, scratch);
    const Vec<T> zero{}, half = splat<T>(0.5);
    const IVec<T> none{}, one = none + 1;
    for (int64_t e = 0; e < sizes.pairs; ++e) {
      const Mask<T> either = scratch.by_first[e] | scratch.by_second[e];
      const Mask<T> both = scratch.by_first[e] & scratch.by_second[e];
      const Vec<T> w = scratch.weights[e];
      scratch.weights[e] = select<T>(either, select<T>(both, w, w * half), zero);
      const IVec<T> ends = select_int<T>(either, select_int<T>(both, one + 1, one), none);
      store_bytes<T>(picks + first + e * sizes.steps, ends, count);
    }
    T* to = adjacency + (b * sizes.steps + t0) * entries;
    for (int64_t p = 0; p < entries; p += lanes) {
      const int width = static_cast<int>(std::min<int64_t>(lanes, entries - p));
      Vec<T> r[lanes];
      for (int k = 0; k < lanes; ++k) r[k] = k < width ? scratch.weights[numbers[p + k]] : zero;
      transpose<T>(r);
      for (int t = 0; t < count; ++t) store_first(to + t * entries + p, r[t], width);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct BackwardScratch {
  std::vector<Vec<T>> entries;

  explicit BackwardScratch(const Sizes& s) : entries(s.nodes * s.nodes + kLanes<T>) {}
};

template <class T>
void backward(const Sizes& sizes, const T* grad, const uint8_t* picks, T* out) {
  constexpr int lanes = kLanes<T>;
  const int64_t n = sizes.nodes, entries = n * n;
  for_each_block<T, BackwardScratch<T>>(sizes, [&](int64_t b, int64_t t0, int count, BackwardScratch<T>& scratch) {
    const T* from = grad + (b * sizes.steps + t0) * entries;
    for (int64_t p = 0; p < entries; p += lanes) {
      const int width = static_cast<int>(std::min<int64_t>(lanes, entries - p));
      Vec<T> r[lanes];
      for (int t = 0; t < lanes; ++t) r[t] = t < count ? load_first(from + t * entries + p, width) : Vec<T>{};
      transpose<T>(r);
      for (int k = 0; k < lanes; ++k) scratch.entries[p + k] = r[k];
    }
    const Vec<T> zero{}, half = splat<T>(0.5);
    int64_t at = b * sizes.pairs * sizes.steps + t0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j, at += sizes.steps) {
        const IVec<T> ends = load_bytes<T>(picks + at, count);
        const Vec<T> sum = scratch.entries[i * n + j] + scratch.entries[j * n + i];
        const Vec<T> shared = select<T>(equal_to<T>(ends, 2), sum, sum * half);
        store_first(out + at, select<T>(greater_than<T>(ends, 0), shared, zero), count);
      }
  });
}

// ---- entry --------------------------------------------------------------------------------------------------------

void assemble_adjacency_fwd(Tensor weights, int64_t top_k, double threshold, Tensor adjacency, Tensor picks) {
  const Sizes sizes{weights.size(0), weights.size(1), weights.size(2), adjacency.size(2)};
  const auto run = [&]<class T>(T) {
    forward<T>(sizes, static_cast<const T*>(weights.const_data_ptr()), top_k, static_cast<T>(threshold),
               static_cast<T*>(adjacency.mutable_data_ptr()), static_cast<uint8_t*>(picks.mutable_data_ptr()));
  };
  weights.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

void assemble_adjacency_bwd(Tensor grad, Tensor picks, Tensor grad_weights) {
  const Sizes sizes{picks.size(0), picks.size(1), picks.size(2), grad.size(2)};
  const auto run = [&]<class T>(T) {
    backward<T>(sizes, static_cast<const T*>(grad.const_data_ptr()),
                static_cast<const uint8_t*>(picks.const_data_ptr()), static_cast<T*>(grad_weights.mutable_data_ptr()));
  };
  grad.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "assemble_adjacency_fwd(Tensor weights, int top_k, float threshold, Tensor(a!) adjacency, Tensor(b!) picks) -> ()");
  m.def("assemble_adjacency_bwd(Tensor grad, Tensor picks, Tensor(a!) grad_weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("assemble_adjacency_fwd", TORCH_BOX(&stablekern::assemble_adjacency_fwd));
  m.impl("assemble_adjacency_bwd", TORCH_BOX(&stablekern::assemble_adjacency_bwd));
}
