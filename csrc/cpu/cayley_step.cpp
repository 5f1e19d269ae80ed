// The Cayley step of a sparse Laplacian and its adjoint; the mathematics is in stablekern/ops/cayley_step.py.
//
// A tile is a few tokens: one vector holds the same node of kLanes / 2 of them, real and imaginary parts beside each
// other, and kBlocks vectors make a node, so that one weight and one index serve them all. H is real, so a row of it
// acts on whole vectors; what is complex (the coefficients) costs a swap of the pairs per node, not per entry. All
// terms of the expansion are applied to a tile while it lies in the caches: a token is read once and written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/split_product.h"
#include "stablekern/tensor.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kStreamBytes = 2 * 1024 * 1024;  // a result larger than a core's L2 leaves past the caches
constexpr int64_t kGrainEntries = 32 * 1024;       // sparse entries times vectors that are worth a thread
constexpr int64_t kFlushTiles = 16;                // tiles that are summed in T before the sum goes on in double
constexpr int64_t kMostShares = 64;                // shares of the tokens, each with edge sums of its own
constexpr int kBlocks = 4;                         // vectors to a node
constexpr int kRows = kVectorBytes == 64 ? 4 : 2;  // of the operator at a time, as many as there are registers for
constexpr int kLeastSharing = (kRows + 2) / 2;     // that must have a neighbour for it to be read once for all

template <class T>
constexpr int kTokens = kLanes<T> / 2;  // tokens to a vector, and nodes to a transpose
template <class T>
constexpr int kTile = kTokens<T> * kBlocks;

// The neighbours of every node, in the order of the edges.
struct Graph {
  int64_t nodes, edges;
  std::vector<int64_t> begin;  // of a node's entries; nodes + 1 of them
  std::vector<int32_t> other;  // the node at the far end
  std::vector<int32_t> edge;   // its number
};

Graph graph_of(const Tensor& edges, int64_t nodes) {
  Graph g{nodes, edges.size(1), std::vector<int64_t>(nodes + 2), {}, {}};
  const int64_t* first = data<int64_t>(edges);
  const int64_t* second = first + g.edges;
  g.other.resize(2 * g.edges);
  g.edge.resize(2 * g.edges);
  for (int64_t e = 0; e < g.edges; ++e) {
    ++g.begin[first[e] + 2];
    ++g.begin[second[e] + 2];
  }
  for (int64_t i = 2; i < nodes + 2; ++i) g.begin[i] += g.begin[i - 1];
  for (int64_t e = 0; e < g.edges; ++e) {
    const auto put = [&](int64_t at, int64_t far) {
      const int64_t slot = g.begin[at + 1]++;
      g.other[slot] = static_cast<int32_t>(far);
      g.edge[slot] = static_cast<int32_t>(e);
    };
    put(first[e], second[e]);
    put(second[e], first[e]);
  }
  return g;
}

// Twice (H - mid) / half, as the expansion wants it, kRows rows at a time. A neighbour of most of them is read once for
// all, with a weight for each, 0 where there is no edge: on a ring, or where nodes that are near have near numbers,
// that is nearly every one. The others stand by themselves.
template <class T>
struct Operator {
  struct Shared {
    int64_t node;
    T weight[kRows];
  };
  struct Single {
    int32_t node;
    T weight;
  };
  std::vector<T> diagonal;
  std::vector<Shared> shared;
  std::vector<Single> singles;
  std::vector<int64_t> shared_end;  // of each group of rows
  std::vector<int64_t> single_end;  // of each row

  Operator(const Graph& g, const T* weights, double mid, double half) : diagonal(g.nodes), single_end(g.nodes) {
    const double scale = 2 / half;
    std::vector<int32_t> owners(g.nodes);  // how many rows of the group have this neighbour
    std::vector<int64_t> place(g.nodes, -1);
    for (int64_t first = 0; first < g.nodes; first += kRows) {
      const int64_t last = std::min(first + kRows, g.nodes);
      const bool whole = last - first == kRows;  // fewer rows share nothing
      for (int64_t s = g.begin[first]; s < g.begin[last]; ++s) ++owners[g.other[s]];
      for (int64_t i = first; i < last; ++i) {
        double degree = 0;
        for (int64_t s = g.begin[i]; s < g.begin[i + 1]; ++s) {
          const int32_t node = g.other[s];
          const T weight = static_cast<T>(-scale * weights[g.edge[s]]);
          degree += weights[g.edge[s]];
          if (!whole || owners[node] < kLeastSharing) {
            singles.push_back({node, weight});
            continue;
          }
          if (place[node] < 0) {
            place[node] = static_cast<int64_t>(shared.size());
            shared.push_back({node, {}});
          }
          shared[place[node]].weight[i - first] = weight;
        }
        diagonal[i] = static_cast<T>(scale * (degree - mid));
        single_end[i] = static_cast<int64_t>(singles.size());
      }
      for (int64_t s = g.begin[first]; s < g.begin[last]; ++s) {
        owners[g.other[s]] = 0;
        place[g.other[s]] = -1;
      }
      shared_end.push_back(static_cast<int64_t>(shared.size()));
    }
  }
};

// What is read next, brought to the second-level cache line by line while there is something to compute.
class Ahead {
 public:
  // `bytes` at `from`, and as many at `too` unless that is null, within so many steps.
  void set(const void* from, const void* too, int64_t bytes, int64_t steps) {
    from_ = static_cast<const char*>(from);
    too_ = static_cast<const char*>(too);
    at_ = 0;
    bytes_ = bytes;
    each_ = (bytes / kLine + steps - 1) / steps * kLine;
  }
  SK_INLINE void step() {
    for (const int64_t stop = std::min(at_ + each_, bytes_); at_ < stop; at_ += kLine) {
      __builtin_prefetch(from_ + at_, 0, 2);
      if (too_ != nullptr) __builtin_prefetch(too_ + at_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *from_ = nullptr, *too_ = nullptr;
  int64_t at_ = 0, bytes_ = 0, each_ = 0;
};

// ---- tiles --------------------------------------------------------------------------------------------------------

// Tokens to vectors: `to[node * kBlocks + block]`. The nodes are padded to whole transposes; missing tokens are 0.
template <class T>
SK_INLINE void load_tile(const T* from, int64_t nodes, int64_t tokens, Vec<T>* to) {
  constexpr int side = kTokens<T>;
  for (int block = 0; block < kBlocks; ++block) {
    const int64_t rows = std::clamp<int64_t>(tokens - block * side, 0, side);
    const T* first = from + block * side * 2 * nodes;
    for (int64_t c = 0; c < nodes; c += side) {
      const int here = 2 * static_cast<int>(std::min<int64_t>(side, nodes - c));
      Vec<T> r[side];
      for (int k = 0; k < side; ++k) {
        const T* at = first + k * 2 * nodes + 2 * c;
        r[k] = k >= rows ? Vec<T>{} : here == kLanes<T> ? load(at) : load_first(at, here);
      }
      transpose_pairs<T>(r);
      for (int k = 0; k < side; ++k) to[(c + k) * kBlocks + block] = r[k];
    }
  }
}

// Where the result of a tile goes: kTokens nodes of a block leave at a time, while others are computed where that saves
// time, since memory is slow to take a whole tile.
template <class T>
class Leaving {
 public:
  Leaving(int64_t nodes, bool streaming) : nodes_(nodes), streaming_(streaming) {}
  void set(T* to, int64_t tokens) {
    to_ = to;
    tokens_ = tokens;
    at_ = block_ = 0;
  }
  // The next ones, if the nodes before `ready` reach so far. What leaves is final(place, block, what the tile has at
  // this place), and stays there.
  template <class Final>
  SK_INLINE void step(Vec<T>* tile, int64_t ready, Final final) {
    if (at_ >= nodes_ || std::min<int64_t>(at_ + kTokens<T>, nodes_) > ready) return;
    put(tile, at_, block_, final);
    if (++block_ == kBlocks) {
      block_ = 0;
      at_ += kTokens<T>;
    }
  }
  // All others, token by token, as memory likes it.
  template <class Final>
  SK_NOINLINE void rest(Vec<T>* tile, Final final) {
    for (int b = 0; b < kBlocks; ++b)
      for (int64_t c = b < block_ ? at_ + kTokens<T> : at_; c < nodes_; c += kTokens<T>) put(tile, c, b, final);
  }

 private:
  // kTokens nodes from `c` on.
  template <class Final>
  SK_INLINE void put(Vec<T>* tile, int64_t c, int block, Final final) const {
    constexpr int side = kTokens<T>;
    const int here = 2 * static_cast<int>(std::min<int64_t>(side, nodes_ - c));
    Vec<T> r[side];
    for (int k = 0; k < side; ++k) {
      const int64_t place = (c + k) * kBlocks + block;
      tile[place] = r[k] = final(place, block, tile[place]);
    }
    transpose_pairs<T>(r);
    const int64_t rows = std::clamp<int64_t>(tokens_ - block * side, 0, side);
    for (int k = 0; k < rows; ++k) {
      T* to = to_ + ((block * side + k) * nodes_ + c) * 2;
      if (streaming_)
        stream<T>(to, r[k]);
      else if (here == kLanes<T>)
        store(to, r[k]);
      else
        store_first(to, r[k], here);
    }
  }

  int64_t nodes_;
  bool streaming_;
  T* to_ = nullptr;
  int64_t tokens_ = 0, at_ = 0;
  int block_ = 0;
};

// A complex number to multiply pairs with: v * re + swapped(v) * (-im, im, ...).
template <class T>
struct Coefficient {
  Vec<T> re, im;

  Coefficient(double real, double imaginary) : re(splat(static_cast<T>(real))), im(splat(static_cast<T>(imaginary))) {
    for (int k = 0; k < kLanes<T>; k += 2) im[k] = -im[k];
  }
  SK_INLINE Vec<T> times(Vec<T> v) const { return fma(swap_pairs<T>(v), im, v * re); }
  SK_INLINE Vec<T> times_plus(Vec<T> v, Vec<T> sum) const { return fma(swap_pairs<T>(v), im, fma(v, re, sum)); }
};

// ---- the expansion ------------------------------------------------------------------------------------------------

enum class Pass { kFirst, kSecond, kLater };

// What each row of the operator is for: to = alpha * p + gamma * (Operator x) [- to]; gamma is complex in the first
// pass, whose x is p, and real afterwards.
template <class T>
struct Recurrence {
  const Vec<T> *x, *p;
  Coefficient<T> alpha, gamma;
  Vec<T>* to;

  template <Pass pass>
  SK_INLINE void put(int64_t at, Vec<T> sum) const {
    if constexpr (pass == Pass::kFirst)
      to[at] = alpha.times_plus(p[at], gamma.times(sum));
    else if constexpr (pass == Pass::kSecond)
      to[at] = alpha.times_plus(p[at], gamma.re * sum);
    else
      to[at] = alpha.times_plus(p[at], fma(gamma.re, sum, -to[at]));
  }

  // Rows from i on, group number `group`.
  template <Pass pass, int rows>
  SK_INLINE void put_rows(const Operator<T>& h, int64_t i, int64_t group) const {
    Vec<T> sum[rows][kBlocks];
    for (int r = 0; r < rows; ++r)
      for (int b = 0; b < kBlocks; ++b) sum[r][b] = splat(h.diagonal[i + r]) * x[(i + r) * kBlocks + b];
    if constexpr (rows == kRows) {
      const auto* end = h.shared.data() + h.shared_end[group];
      for (const auto* s = h.shared.data() + (group == 0 ? 0 : h.shared_end[group - 1]); s != end; ++s) {
        const Vec<T>* far = x + s->node * kBlocks;
        for (int r = 0; r < rows; ++r) {
          const Vec<T> w = splat(s->weight[r]);
          for (int b = 0; b < kBlocks; ++b) sum[r][b] = fma(w, far[b], sum[r][b]);
        }
      }
    }
    const auto* s = h.singles.data() + (i == 0 ? 0 : h.single_end[i - 1]);
    for (int r = 0; r < rows; ++r) {
      for (const auto* end = h.singles.data() + h.single_end[i + r]; s != end; ++s) {
        const Vec<T>* far = x + static_cast<int64_t>(s->node) * kBlocks;
        const Vec<T> w = splat(s->weight);
        for (int b = 0; b < kBlocks; ++b) sum[r][b] = fma(w, far[b], sum[r][b]);
      }
      for (int b = 0; b < kBlocks; ++b) put<pass>((i + r) * kBlocks + b, sum[r][b]);
    }
  }
};

template <class T, Pass pass>
SK_NOINLINE void sweep(const Operator<T>& h, const Vec<T>* x, const Vec<T>* p, Coefficient<T> alpha,
                       Coefficient<T> gamma, Vec<T>* to, Ahead& ahead) {
  const Recurrence<T> recurrence{x, p, alpha, gamma, to};
  const int64_t nodes = static_cast<int64_t>(h.diagonal.size());
  int64_t i = 0;
  for (; i + kRows <= nodes; i += kRows) {
    for (int r = 0; r < kRows; ++r) ahead.step();
    recurrence.template put_rows<pass, kRows>(h, i, i / kRows);
  }
  for (; i < nodes; ++i) recurrence.template put_rows<pass, 1>(h, i, 0);
}

// What is applied to a tile: sum of c_k T_k by Clenshaw's recurrence, and then, if there is a dense factor, that.
template <class T>
struct Solver {
  const Graph& graph;
  Operator<T> h;
  const double* coefficients;  // (terms, 2)
  int64_t terms;
  const T* dense;                    // null: none
  T shift;                           // what it lacks on its diagonal
  std::optional<SplitMatrix> split;  // `dense` once more, where there is a unit that multiplies it
  int64_t padded;                    // vectors of a tile

  Solver(const Graph& g, const T* weights, const Tensor& c, double mid, double half, const Tensor& factor,
         double shift)
      : graph(g),
        h(g, weights, mid, half),
        coefficients(data<double>(c)),
        terms(c.size(0)),
        dense(factor.numel() ? data<T>(factor) : nullptr),
        shift(static_cast<T>(shift)),
        padded((g.nodes + kTokens<T> - 1) / kTokens<T> * kTokens<T> * kBlocks) {
    if constexpr (std::is_same_v<T, float>) {
      if (dense == nullptr || !uses_matrix_unit(g.nodes)) return;
      split.emplace(dense, g.nodes);
      padded = std::max(padded, split->padded() * kBlocks);
    }
  }

  int64_t work_per_tile() const {
    const int64_t per_term = (graph.nodes + 2 * graph.edges) * kBlocks;
    return per_term * std::max<int64_t>(terms - 1, 1) + (dense == nullptr ? 0 : graph.nodes * graph.nodes * kBlocks);
  }

  Coefficient<T> coefficient(int64_t k, double sign, double factor = 1) const {
    return {factor * coefficients[2 * k], sign * factor * coefficients[2 * k + 1]};
  }

  // Steps that a tile takes, for what comes ahead of the next one.
  int64_t steps() const { return split ? split->steps(kBlocks) : graph.nodes * std::max<int64_t>(terms - 1, 1); }

  // Numbers that apply() needs room for, in a cache line of their own.
  int64_t scratch() const { return split ? split->scratch(kBlocks) : 0; }
  // What a thread holds while it calls apply().
  std::optional<MatrixUnit> unit() const {
    return split ? std::optional<MatrixUnit>(std::in_place) : std::nullopt;
  }

  // The result has left, and stands in one of `first` and `second`, which is returned; `sign` is -1 for the conjugate
  // operator.
  Vec<T>* apply(const Vec<T>* p, Vec<T>* first, Vec<T>* second, uint16_t* scratch, double sign, Ahead& ahead,
                Leaving<T>& leaving) const {
    if (dense == nullptr) {
      Vec<T>* result = expand(p, first, second, sign, ahead);
      leaving.rest(result, [](int64_t, int, Vec<T> v) { return v; });
      return result;
    }
    Ahead none;
    const Vec<T>* x = expand(p, first, second, sign, split ? none : ahead);
    Vec<T>* to = x == first ? second : first;
    const auto shifted = [=, s = splat(shift)](int64_t at, Vec<T> v) { return v + fma(s, x[at], -p[at]); };
    if constexpr (std::is_same_v<T, float>)
      if (split) {
        PowerOfTwo<T> size[kBlocks];
        const auto final = [&](int64_t at, int block, Vec<T> v) { return shifted(at, v * size[block].up); };
        split->template multiply<kBlocks>(x, scratch, size, to, [&](int64_t ready) {
          ahead.step();
          leaving.step(to, ready, final);
        });
        leaving.rest(to, final);
        return to;
      }
    multiply(x, to);
    leaving.rest(to, [&](int64_t at, int, Vec<T> v) { return shifted(at, v); });
    return to;
  }

  Vec<T>* expand(const Vec<T>* p, Vec<T>* first, Vec<T>* second, double sign, Ahead& ahead) const {
    if (terms == 1) {
      const Coefficient<T> c = coefficient(0, sign);
      for (int64_t i = 0; i < graph.nodes * kBlocks; ++i) first[i] = c.times(p[i]);
      return first;
    }
    const Coefficient<T> half(0.5, 0), one(1, 0);
    if (terms == 2) {
      sweep<T, Pass::kFirst>(h, p, p, coefficient(0, sign), coefficient(1, sign, 0.5), first, ahead);
      return first;
    }
    // b_{K-1} = c_{K-1} p is never formed: it is folded into the two that need it.
    sweep<T, Pass::kFirst>(h, p, p, coefficient(terms - 2, sign), coefficient(terms - 1, sign), first,
                           ahead);
    const double* c = coefficients + 2 * (terms - 3);
    const Coefficient<T> alpha(c[0] - c[4], sign * (c[1] - c[5]));
    sweep<T, Pass::kSecond>(h, first, p, alpha, terms == 3 ? half : one, second, ahead);
    for (int64_t k = terms - 4; k >= 0; --k) {
      sweep<T, Pass::kLater>(h, second, p, coefficient(k, sign), k == 0 ? half : one, first, ahead);
      std::swap(first, second);
    }
    return second;
  }

  // to = dense x for the symmetric `dense`.
  SK_NOINLINE void multiply(const Vec<T>* x, Vec<T>* to) const {
    constexpr int rows = kVectorBytes == 64 ? 6 : 2;
    int64_t i = 0;
    for (; i + rows <= graph.nodes; i += rows) multiply_rows<rows>(x, i, to);
    for (; i < graph.nodes; ++i) multiply_rows<1>(x, i, to);
  }

  template <int rows>
  SK_INLINE void multiply_rows(const Vec<T>* x, int64_t i, Vec<T>* to) const {
    Vec<T> sum[rows][kBlocks] = {};
    for (int64_t k = 0; k < graph.nodes; ++k) {
      const T* column = dense + k * graph.nodes + i;
      for (int r = 0; r < rows; ++r) {
        const Vec<T> m = splat(column[r]);
        for (int b = 0; b < kBlocks; ++b) sum[r][b] = fma(m, x[k * kBlocks + b], sum[r][b]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int b = 0; b < kBlocks; ++b) to[(i + r) * kBlocks + b] = sum[r][b];
  }
};

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
bool streams(const Tensor& like, const T* to, int64_t nodes) {
  return like.numel() * 2 * static_cast<int64_t>(sizeof(T)) > kStreamBytes &&
         reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0 && nodes % kTokens<T> == 0;
}

template <class T>
void forward(const Tensor& psi, const Tensor& edges, const Tensor& weights, const Tensor& coefficients, double mid,
             double half, const Tensor& dense, double shift, bool conjugate, Tensor& out) {
  const int64_t tokens = psi.size(0), nodes = psi.size(1), token_bytes = nodes * 2 * static_cast<int64_t>(sizeof(T));
  if (tokens == 0 || nodes == 0) return;
  const Graph graph = graph_of(edges, nodes);
  const Solver<T> solver(graph, data<T>(weights), coefficients, mid, half, dense, shift);
  const T* from = data<T>(psi);
  T* to = mutable_data<T>(out);
  const bool streaming = streams(out, to, nodes);
  const int64_t grain = std::max<int64_t>(1, kGrainEntries / std::max<int64_t>(1, solver.work_per_tile()));
  torch::stable::parallel_for(0, (tokens + kTile<T> - 1) / kTile<T>, grain, [&](int64_t begin, int64_t end) {
    Arena arena;
    for (int k = 0; k < 3; ++k) arena.reserve<Vec<T>>(solver.padded);
    arena.reserve<uint16_t>(solver.scratch());
    arena.allocate();
    Vec<T>* p = arena.take<Vec<T>>(solver.padded);
    Vec<T>* first = arena.take<Vec<T>>(solver.padded);
    Vec<T>* second = arena.take<Vec<T>>(solver.padded);
    uint16_t* scratch = arena.take<uint16_t>(solver.scratch());
    [[maybe_unused]] const auto unit = solver.unit();
    Ahead ahead;
    Leaving<T> leaving(nodes, streaming);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t at = tile * kTile<T>, here = std::min<int64_t>(kTile<T>, tokens - at);
      load_tile(from + at * 2 * nodes, nodes, here, p);
      const int64_t next = at + kTile<T>, count = tile + 1 < end ? std::min<int64_t>(kTile<T>, tokens - next) : 0;
      ahead.set(from + next * 2 * nodes, nullptr, count * token_bytes, solver.steps());
      leaving.set(to + at * 2 * nodes, here);
      solver.apply(p, first, second, scratch, conjugate ? -1 : 1, ahead, leaving);
    }
    if (streaming) stream_fence();
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

// Each edge once, at its lower node.
struct EdgesOnce {
  std::vector<int64_t> begin;
  std::vector<int32_t> higher, edge;

  explicit EdgesOnce(const Graph& g) : begin(g.nodes + 1) {
    for (int64_t i = 0; i < g.nodes; ++i) {
      for (int64_t s = g.begin[i]; s < g.begin[i + 1]; ++s)
        if (g.other[s] > i) {
          higher.push_back(g.other[s]);
          edge.push_back(g.edge[s]);
        }
      begin[i + 1] = static_cast<int64_t>(edge.size());
    }
  }
};

// Sums over the tokens of Im(conj(l_j - l_k) (z_j - z_k)), edge by edge: a vector each while a few tiles go by, then a
// double each.
template <class T>
struct EdgeSums {
  const EdgesOnce& edges;
  Vec<T>* lanes;  // for each of them
  int64_t tiles = 0;

  // l, and z turned by -90 degrees, (im, -re), so that the products of lanes sum up to the imaginary part.
  SK_NOINLINE void add(const Vec<T>* l, const Vec<T>* z, Ahead& ahead) {
    const int64_t nodes = static_cast<int64_t>(edges.begin.size()) - 1;
    for (int64_t i = 0; i < nodes; ++i) {
      ahead.step();
      Vec<T> left[kBlocks], right[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        left[b] = l[i * kBlocks + b];
        right[b] = z[i * kBlocks + b];
      }
      for (int64_t s = edges.begin[i]; s < edges.begin[i + 1]; ++s) {
        const int64_t k = edges.higher[s];
        Vec<T> sum = lanes[s];
        for (int b = 0; b < kBlocks; ++b) sum = fma(left[b] - l[k * kBlocks + b], right[b] - z[k * kBlocks + b], sum);
        lanes[s] = sum;
      }
    }
    ++tiles;
  }

  void flush(double* to) {
    if (tiles == 0) return;
    for (std::size_t s = 0; s < edges.edge.size(); ++s) {
      to[edges.edge[s]] += static_cast<double>(horizontal_sum(lanes[s]));
      lanes[s] = Vec<T>{};
    }
    tiles = 0;
  }
};

// Without coefficients `grad_psi` is given, else it is the conjugate operator's result for `grad`.
template <class T>
void backward(const Tensor& grad, const Tensor& psi, const Tensor& out, const Tensor& edges, const Tensor& weights,
              const Tensor& coefficients, double mid, double half, const Tensor& dense, double shift, Tensor& grad_psi,
              Tensor& edge_sums) {
  const int64_t tokens = psi.size(0), nodes = psi.size(1), count = edges.size(1);
  const int64_t token_bytes = nodes * 2 * static_cast<int64_t>(sizeof(T));
  double* sums = mutable_data<double>(edge_sums);
  std::fill_n(sums, count, 0.0);
  if (tokens == 0 || nodes == 0) return;
  const Graph graph = graph_of(edges, nodes);
  const Solver<T> solver(graph, data<T>(weights), coefficients, mid, half, dense, shift);
  const EdgesOnce once(graph);
  const bool given = solver.terms == 0;
  T* to = mutable_data<T>(grad_psi);
  const bool streaming = !given && streams(grad_psi, to, nodes);

  // The shares do not depend on the number of threads, so the sums have the same bits for any.
  const int64_t tiles = (tokens + kTile<T> - 1) / kTile<T>;
  const int64_t per_share = std::max(kFlushTiles, (tiles + kMostShares - 1) / kMostShares);
  const int64_t shares = (tiles + per_share - 1) / per_share;
  const std::unique_ptr<double[]> parts(new double[static_cast<size_t>(shares * count + 1)]());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    constexpr int kArrays = 4;
    Arena arena;
    for (int k = 0; k < kArrays; ++k) arena.reserve<Vec<T>>(solver.padded);
    arena.reserve<Vec<T>>(count);
    arena.reserve<uint16_t>(solver.scratch());
    arena.allocate();
    Vec<T>* tile[kArrays];
    for (auto& t : tile) t = arena.take<Vec<T>>(solver.padded);
    auto [g, first, second, z] = tile;
    EdgeSums<T> edge{once, arena.take<Vec<T>>(count)};
    uint16_t* scratch = arena.take<uint16_t>(solver.scratch());
    [[maybe_unused]] const auto unit = solver.unit();
    Ahead ahead;
    Leaving<T> leaving(nodes, streaming);
    Vec<T> sign = splat(T(1));
    for (int k = 1; k < kLanes<T>; k += 2) sign[k] = -1;
    for (int64_t share = begin; share < end; ++share) {
      double* part = parts.get() + share * count;
      const int64_t last = std::min(tiles, (share + 1) * per_share);
      for (int64_t t = share * per_share; t < last; ++t) {
        const int64_t at = t * kTile<T> * 2 * nodes, here = std::min<int64_t>(kTile<T>, tokens - t * kTile<T>);
        load_tile(data<T>(grad) + at, nodes, here, g);
        Vec<T>* result = first;
        if (given) {
          load_tile(data<T>(grad_psi) + at, nodes, here, first);
        } else {
          ahead.set(data<T>(psi) + at, data<T>(out) + at, here * token_bytes, solver.steps());
          leaving.set(to + at, here);
          result = solver.apply(g, first, second, scratch, -1, ahead, leaving);
        }
        Vec<T>* other = result == first ? second : first;
        load_tile(data<T>(psi) + at, nodes, here, z);
        load_tile(data<T>(out) + at, nodes, here, other);
        for (int64_t k = 0; k < nodes * kBlocks; ++k) {
          result[k] += g[k];  // twice the solution of the adjoint system
          z[k] = swap_pairs<T>(z[k] + other[k]) * sign;
        }
        const int64_t left = t + 1 < last ? std::min<int64_t>(kTile<T>, tokens - (t + 1) * kTile<T>) : 0;
        ahead.set(data<T>(grad) + at + kTile<T> * 2 * nodes, nullptr, left * token_bytes, nodes);
        edge.add(result, z, ahead);
        if (edge.tiles == kFlushTiles) edge.flush(part);
      }
      edge.flush(part);
    }
    if (streaming) stream_fence();
  });
  for (int64_t share = 0; share < shares; ++share)
    for (int64_t e = 0; e < count; ++e) sums[e] += parts[share * count + e];
  for (int64_t e = 0; e < count; ++e) sums[e] /= 2;
}

// ---- the interval -------------------------------------------------------------------------------------------------

// An interval that holds the eigenvalues: Gershgorin's below; above, the best of the bounds max (|H| x)_i / x_i
// (Collatz and Wielandt) along a power iteration, which start at Gershgorin's.
template <class T>
void interval(const Graph& g, const T* weights, int64_t steps, double* to) {
  std::vector<double> diagonal(g.nodes), x(g.nodes, 1.0), next(g.nodes);
  double low = 0, high = -std::numeric_limits<double>::infinity(), absolute = 0;
  bool finite = true;
  for (int64_t i = 0; i < g.nodes; ++i) {
    double degree = 0, radius = 0;
    for (int64_t s = g.begin[i]; s < g.begin[i + 1]; ++s) {
      degree += weights[g.edge[s]];
      radius += std::abs(static_cast<double>(weights[g.edge[s]]));
    }
    finite = finite && std::isfinite(radius);
    low = std::min(low, degree - radius);
    high = std::max(high, degree + radius);
    absolute = std::max(absolute, std::abs(degree) + radius);
    diagonal[i] = std::abs(degree);
  }
  if (!finite) {
    to[0] = to[1] = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  double best = absolute;
  for (int64_t step = 0; step < steps && best > 0; ++step) {
    const double down = 1 / best;
    double bound = 0;
    for (int64_t i = 0; i < g.nodes; ++i) {
      double sum = diagonal[i] * x[i];
      for (int64_t s = g.begin[i]; s < g.begin[i + 1]; ++s)
        sum += std::abs(static_cast<double>(weights[g.edge[s]])) * x[g.other[s]];
      bound = std::max(bound, sum / x[i]);
      // Positive, whatever underflows: the bound holds for every positive x.
      next[i] = std::max<double>(sum * down, std::numeric_limits<float>::min());
    }
    best = std::min(best, bound);
    x.swap(next);
  }
  to[0] = std::max(low, -best);
  to[1] = std::min(std::max(high, 0.0), best);
}

// ---- entry --------------------------------------------------------------------------------------------------------

void cayley_step_interval(Tensor edges, Tensor weights, int64_t nodes, int64_t steps, Tensor to) {
  const Graph graph = graph_of(edges, nodes);
  for_dtype(weights, [&](auto zero) {
    using T = decltype(zero);
    interval<T>(graph, data<T>(weights), steps, mutable_data<double>(to));
  });
}

void cayley_step_fwd(Tensor psi, Tensor edges, Tensor weights, Tensor coefficients, double mid, double half,
                     Tensor dense, double shift, bool conjugate, Tensor out) {
  for_dtype(weights, [&](auto zero) {
    forward<decltype(zero)>(psi, edges, weights, coefficients, mid, half, dense, shift, conjugate, out);
  });
}

void cayley_step_bwd(Tensor grad, Tensor psi, Tensor out, Tensor edges, Tensor weights, Tensor coefficients, double mid,
                     double half, Tensor dense, double shift, Tensor grad_psi, Tensor edge_sums) {
  for_dtype(weights, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(grad, psi, out, edges, weights, coefficients, mid, half, dense, shift, grad_psi, edge_sums);
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("cayley_step_interval(Tensor edges, Tensor weights, int nodes, int steps, Tensor(a!) to) -> ()");
  m.def(
      "cayley_step_fwd(Tensor psi, Tensor edges, Tensor weights, Tensor coefficients, float mid, float half,"
      " Tensor dense, float shift, bool conjugate, Tensor(a!) out) -> ()");
  m.def(
      "cayley_step_bwd(Tensor grad, Tensor psi, Tensor out, Tensor edges, Tensor weights, Tensor coefficients,"
      " float mid, float half, Tensor dense, float shift, Tensor(a!) grad_psi, Tensor(b!) edge_sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("cayley_step_interval", TORCH_BOX(&stablekern::cayley_step_interval));
  m.impl("cayley_step_fwd", TORCH_BOX(&stablekern::cayley_step_fwd));
  m.impl("cayley_step_bwd", TORCH_BOX(&stablekern::cayley_step_bwd));
}
