// Causal attention by tiles of kTile queries and kTile keys with a running softmax (Dao et al., arXiv 2205.14135),
// forward and backward. Activations are fp32 or bf16, arithmetic fp32, so nothing is rounded between the products.
//
// A head is copied to fp32 once; from then on everything between two products lies in the first two caches. Scores
// stand with the keys down and the queries across, so that maximum, sum and gradient of the softmax need no sums
// inside a vector. Tiles a query cannot see are left out: those after it, and those before its document.
//
// Threads share heads (forward) and groups of heads with the same keys (backward), and no sum crosses these: their
// number changes no bit.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <utility>

#include "simd.h"

namespace {

// Rows and vectors of a product that is kept in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDown = 6, kAcross = 4;
#else
constexpr int kDown = 6, kAcross = 2;
#endif
constexpr int64_t kTile = 64;
constexpr int64_t kVectors = kTile / kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

int64_t whole(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// A tensor (batch, heads, length, width) by its strides in elements; the last axis is dense.
struct View {
  void* data;
  int64_t batch, head, position;
};

struct Shape {
  int64_t batch, heads, groups, length, width, value_width;
  float scale;
  const int64_t* first;  // (batch, length) the earliest key each query sees, or null
  int64_t first_row;     // 0 where all rows share it
};

template <class T>
struct Head {
  T* data;
  int64_t step;
  Head(const View& view, int64_t batch, int64_t head)
      : data((T*)view.data + batch * view.batch + head * view.head), step(view.position) {}
  T* at(int64_t position) const { return data + position * step; }
};

// Floats on a cache line of their own.
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_((float*)std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)) {}
  operator float*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

// A left operand: element (row, k) of it at p[row * down + k * along].
struct Left {
  const float* p;
  int64_t down, along;
  Left from(int64_t row, int64_t k) const { return {p + row * down + k * along, down, along}; }
};

template <int M, int N>
inline void product_in_registers(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
                                 bool add) {
  Vec sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sums[i][j] = add ? load(c + i * c_row + j * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k, a.p += a.along, b += b_row) {
    Vec right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const float left = a.p[i * a.down];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
}

template <int M, int N>
inline void rows_of_product(int64_t rows, Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
                            int64_t depth, bool add) {
  for (; rows >= M; rows -= M, a = a.from(M, 0), c += M * c_row)
    product_in_registers<M, N>(a, b, b_row, c, c_row, depth, add);
  if constexpr (M > 1)
    if (rows > 0) rows_of_product<M - 1, N>(rows, a, b, b_row, c, c_row, depth, add);
}

template <int N>
inline void columns_of_product(int64_t vectors, int64_t rows, Left a, const float* b, int64_t b_row, float* c,
                               int64_t c_row, int64_t depth, bool add) {
  for (; vectors >= N; vectors -= N, b += N * kLanes, c += N * kLanes)
    rows_of_product<kDown, N>(rows, a, b, b_row, c, c_row, depth, add);
  if constexpr (N > 1)
    if (vectors > 0) columns_of_product<N - 1>(vectors, rows, a, b, b_row, c, c_row, depth, add);
}

// c (rows, width) = a (rows, depth) b (depth, width), or added to it; width in whole vectors.
void product(int64_t rows, int64_t width, int64_t depth, Left a, const float* b, int64_t b_row, float* c,
             int64_t c_row, bool add) {
  columns_of_product<kAcross>(width / kLanes, rows, a, b, b_row, c, c_row, depth, add);
}

// Where queries and keys of a tile meet. `diagonal`: query i sees keys 0 .. i of it, so that products go by strips
// of one vector and leave out what is not seen; else `masked` says whether a document begins inside it.
struct Meeting {
  int64_t queries, keys;
  bool diagonal, masked;
  int64_t strip() const { return diagonal ? kLanes : kTile; }

  // c (keys, queries) = a (keys, depth) b (depth, queries).
  void scores(Left a, const float* b, int64_t depth, float* c) const {
    for (int64_t i = 0; i < keys; i += strip()) {
      const int64_t unseen = diagonal ? i : 0;
      product(std::min(strip(), keys - i), kTile - unseen, depth, a.from(i, 0), b + unseen, kTile,
              c + i * kTile + unseen, kTile, false);
    }
  }

  // c (queries, width) += w^T b for weights w (keys, queries) and b (keys, width).
  void to_queries(const float* w, const float* b, float* c, int64_t width, bool add) const {
    for (int64_t i = 0; i < queries; i += strip())
      product(std::min(strip(), queries - i), width, diagonal ? std::min(keys, i + kLanes) : keys, {w + i, 1, kTile}, b,
              width, c + i * width, width, add);
  }

  // c (keys, width) += w b for weights w (keys, queries) and b (queries, width).
  void to_keys(const float* w, const float* b, float* c, int64_t width) const {
    for (int64_t i = 0; i < keys; i += strip()) {
      const int64_t unseen = diagonal ? i : 0;
      product(std::min(strip(), keys - i), width, queries - unseen, Left{w, kTile, 1}.from(i, unseen),
              b + unseen * width, width, c + i * width, width, true);
    }
  }
};

// What the queries of a block see, a vector of queries at a time: keys first .. own.
struct Sight {
  Ints first[kVectors], own[kVectors];
  int64_t start, queries, low, latest;  // low: the earliest key of the block; latest: the latest first key

  Sight(const Shape& shape, int64_t batch, int64_t begin) : start(begin) {
    queries = std::min(kTile, shape.length - start);
    const int64_t* bounds = shape.first ? shape.first + batch * shape.first_row + start : nullptr;
    for (int64_t i = 0; i < kTile; ++i) {
      const bool real = i < queries;
      first[i / kLanes][i % kLanes] = real && bounds ? int32_t(bounds[i]) : 0;
      own[i / kLanes][i % kLanes] = real ? int32_t(start + i) : -1;
    }
    low = bounds ? bounds[0] : 0;
    latest = bounds ? bounds[queries - 1] : 0;
  }

  Meeting with(int64_t keys_start) const {
    const bool diagonal = keys_start == start;
    return {queries, diagonal ? queries : kTile, diagonal, diagonal || latest > keys_start};
  }

  Vec shown(Vec scores, int64_t key, int64_t vector) const {
    const Ints at = Ints{} + int32_t(key);
    return (at >= first[vector]) & (at <= own[vector]) ? scores : Vec{} - kInfinity;
  }
};

// `rows` rows of a head from `start` on as fp32 times `scale`, zeros behind each. The tile after them is fetched:
// rows of one head lie apart, where the processor does not see the next one coming.
template <class T>
void gather(Head<T> x, int64_t start, int64_t rows, int64_t width, float scale, float* out) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(x.at(start + row + kTile) + i);
    for (int64_t i = 0; i < width; i += kLanes)
      store(out + row * whole(width) + i, load(x.at(start + row) + i, width - i) * scale);
  }
}

template <class T>
void scatter(const float* rows_of, int64_t start, int64_t rows, int64_t width, float scale, Head<T> out) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += kLanes)
      store(out.at(start + row) + i, load(rows_of + row * whole(width) + i) * scale, width - i);
}

// Lanes of a and b: those of `a` and, one step up or down, those of `b` where bit kStep of the lane says so.
template <int kStep, size_t... kLane>
inline void swap_lanes(Vec* a, Vec* b, std::index_sequence<kLane...>) {
#if defined(__clang__)
  const Vec low = __builtin_shufflevector(*a, *b, int(kLane & kStep ? kLane - kStep + kLanes : kLane)...);
  *b = __builtin_shufflevector(*a, *b, int(kLane & kStep ? kLane + kLanes : kLane + kStep)...);
#else
  const Vec low = __builtin_shuffle(*a, *b, Words{uint32_t(kLane & kStep ? kLane - kStep + kLanes : kLane)...});
  *b = __builtin_shuffle(*a, *b, Words{uint32_t(kLane & kStep ? kLane + kLanes : kLane + kStep)...});
#endif
  *a = low;
}

// kLanes vectors as rows of a square, transposed by halves, quarters and so on.
template <int kStep = 1>
inline void transpose(Vec* square) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) swap_lanes<kStep>(square + i, square + i + kStep, std::make_index_sequence<kLanes>());
  if constexpr (2 * kStep < kLanes) transpose<2 * kStep>(square);
}

// (rows, width) to (width, kTile) times `scale`, zeros behind.
void transpose(const float* x, int64_t rows, int64_t width, float scale, float* out) {
  const int64_t step = whole(width);
  for (int64_t row = 0; row < kTile; row += kLanes)
    for (int64_t i = 0; i < step; i += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) square[j] = row + j < rows ? load(x + (row + j) * step + i) * scale : Vec{};
      transpose(square);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) store(out + (i + j) * kTile + row, square[j]);
    }
}

// Scores to exp2(scores - top) in place, with top and total (queries) of all tiles so far; by what the earlier ones
// are to be multiplied goes to `shrink`.
void running_softmax(float* scores, int64_t keys_start, const Meeting& meeting, const Sight& sight, Vec* top,
                     Vec* total, float* shrink) {
  Vec highest[kVectors];
  std::copy(top, top + kVectors, highest);
  for (int64_t key = 0; key < meeting.keys; ++key)
#pragma GCC unroll 16
    for (int64_t j = 0; j < kVectors; ++j) {
      float* at = scores + key * kTile + j * kLanes;
      Vec v = load(at);
      if (meeting.masked) store(at, v = sight.shown(v, keys_start + key, j));
      highest[j] = v > highest[j] ? v : highest[j];
    }
  for (int64_t j = 0; j < kVectors; ++j) {
    const Vec base = highest[j] == -kInfinity ? Vec{} : highest[j];  // nothing seen yet
    const Vec factor = exp2_(top[j] - base);
    store(shrink + j * kLanes, factor);
    total[j] *= factor;
    top[j] = highest[j];
    highest[j] = base;
  }
  for (int64_t key = 0; key < meeting.keys; ++key)
#pragma GCC unroll 16
    for (int64_t j = 0; j < kVectors; ++j) {
      float* at = scores + key * kTile + j * kLanes;
      const Vec p = exp2_(load(at) - highest[j]);
      total[j] += p;
      store(at, p);
    }
}

// scores to probabilities, d_p to the gradient of the scores, p (d_p - mean), both in place.
void softmax_gradient(float* scores, float* d_p, int64_t keys_start, const Meeting& meeting, const Sight& sight,
                      const Vec* level, const Vec* mean) {
  for (int64_t key = 0; key < meeting.keys; ++key)
#pragma GCC unroll 16
    for (int64_t j = 0; j < kVectors; ++j) {
      const int64_t at = key * kTile + j * kLanes;
      Vec v = load(scores + at);
      if (meeting.masked) v = sight.shown(v, keys_start + key, j);
      const Vec p = exp2_(v - level[j]);
      store(scores + at, p);
      store(d_p + at, p * (load(d_p + at) - mean[j]));
    }
}

// out, and level (batch, heads, length): log2 of the sum of exp(scores) of each query.
template <class T>
void forward(const Shape& shape, View q, View k, View v, View out, float* level, int threads) {
  const int64_t wide = whole(shape.width), value_wide = whole(shape.value_width);
#pragma omp parallel num_threads(threads)
  {
    const Scratch keys(shape.length * wide), values(shape.length * value_wide), queries(kTile * wide),
        across(kTile * wide), scores(kTile * kTile), mixed(kTile * value_wide), shrink(kTile), parts(kTile);
#pragma omp for
    for (int64_t task = 0; task < shape.batch * shape.heads; ++task) {
      const int64_t batch = task / shape.heads, head = task % shape.heads;
      const int64_t group = head / (shape.heads / shape.groups);
      const Head<T> own(q, batch, head), target(out, batch, head);
      for (int64_t start = 0; start < shape.length; start += kTile) {
        const Sight sight(shape, batch, start);
        gather(Head<T>(k, batch, group), start, sight.queries, shape.width, 1, keys + start * wide);
        gather(Head<T>(v, batch, group), start, sight.queries, shape.value_width, 1, values + start * value_wide);
        gather(own, start, sight.queries, shape.width, shape.scale * kLog2e, queries);
        transpose(queries, sight.queries, shape.width, 1, across);
        Vec top[kVectors], total[kVectors];
        std::fill(top, top + kVectors, Vec{} - kInfinity);
        std::fill(total, total + kVectors, Vec{});
        const int64_t begin = sight.low / kTile * kTile;
        for (int64_t at = begin; at <= start; at += kTile) {
          const Meeting meeting = sight.with(at);
          meeting.scores({keys + at * wide, wide, 1}, across, shape.width, scores);
          running_softmax(scores, at, meeting, sight, top, total, shrink);
          if (at > begin)
            for (int64_t i = 0; i < sight.queries; ++i)
              for (int64_t j = 0; j < value_wide; j += kLanes)
                store(mixed + i * value_wide + j, load(mixed + i * value_wide + j) * shrink[i]);
          meeting.to_queries(scores, values + at * value_wide, mixed, value_wide, at > begin);
        }
        for (int64_t j = 0; j < kVectors; ++j) store(parts + j * kLanes, total[j]);
        for (int64_t j = 0; j < kVectors; ++j) store(shrink + j * kLanes, top[j]);
        for (int64_t i = 0; i < sight.queries; ++i) {
          scatter(mixed + i * value_wide, start + i, 1, shape.value_width, 1 / parts[i], target);
          level[task * shape.length + start + i] = shrink[i] + std::log2(parts[i]);
        }
      }
    }
  }
}

template <class T>
void backward(const Shape& shape, View q, View k, View v, View out, View d_out, const float* level, View dq, View dk,
              View dv, int threads) {
  const int64_t wide = whole(shape.width), value_wide = whole(shape.value_width);
  const int64_t share = shape.heads / shape.groups;
#pragma omp parallel num_threads(threads)
  {
    const Scratch keys(shape.length * wide), values(shape.length * value_wide), d_keys(shape.length * wide),
        d_values(shape.length * value_wide), queries(kTile * wide), across(kTile * wide), d_mixed(kTile * value_wide),
        d_across(kTile * value_wide), scores(kTile * kTile), d_scores(kTile * kTile), d_queries(kTile * wide);
#pragma omp for
    for (int64_t task = 0; task < shape.batch * shape.groups; ++task) {
      const int64_t batch = task / shape.groups, group = task % shape.groups;
      std::fill(+d_keys, d_keys + shape.length * wide, 0.0f);
      std::fill(+d_values, d_values + shape.length * value_wide, 0.0f);
      for (int64_t head = group * share; head < (group + 1) * share; ++head)
        for (int64_t start = 0; start < shape.length; start += kTile) {
          const Sight sight(shape, batch, start);
          const Head<T> upstream(d_out, batch, head), mixed(out, batch, head);
          if (head == group * share) {
            gather(Head<T>(k, batch, group), start, sight.queries, shape.width, 1, keys + start * wide);
            gather(Head<T>(v, batch, group), start, sight.queries, shape.value_width, 1, values + start * value_wide);
          }
          gather(Head<T>(q, batch, head), start, sight.queries, shape.width, shape.scale, queries);
          gather(upstream, start, sight.queries, shape.value_width, 1, d_mixed);
          transpose(queries, sight.queries, shape.width, kLog2e, across);
          transpose(d_mixed, sight.queries, shape.value_width, 1, d_across);
          Vec levels[kVectors] = {}, means[kVectors] = {};
          for (int64_t i = 0; i < sight.queries; ++i) {
            Vec sums = {};
            for (int64_t j = 0; j < shape.value_width; j += kLanes)
              sums += load(mixed.at(start + i) + j, shape.value_width - j) * load(d_mixed + i * value_wide + j);
            means[i / kLanes][i % kLanes] = sum(sums);
            levels[i / kLanes][i % kLanes] = level[(batch * shape.heads + head) * shape.length + start + i];
          }
          const int64_t begin = sight.low / kTile * kTile;
          for (int64_t at = begin; at <= start; at += kTile) {
            const Meeting meeting = sight.with(at);
            meeting.scores({keys + at * wide, wide, 1}, across, shape.width, scores);
            meeting.scores({values + at * value_wide, value_wide, 1}, d_across, shape.value_width, d_scores);
            softmax_gradient(scores, d_scores, at, meeting, sight, levels, means);
            meeting.to_keys(scores, d_mixed, d_values + at * value_wide, value_wide);
            meeting.to_keys(d_scores, queries, d_keys + at * wide, wide);
            meeting.to_queries(d_scores, keys + at * wide, d_queries, wide, at > begin);
          }
          scatter(d_queries, start, sight.queries, shape.width, shape.scale, Head<T>(dq, batch, head));
        }
      scatter(d_keys, 0, shape.length, shape.width, 1, Head<T>(dk, batch, group));
      scatter(d_values, 0, shape.length, shape.value_width, 1, Head<T>(dv, batch, group));
    }
  }
}

}  // namespace

extern "C" {

void attention_forward(const Shape* shape, const View* views, float* level, int half, int threads) {
  half ? forward<bf16>(*shape, views[0], views[1], views[2], views[3], level, threads)
       : forward<float>(*shape, views[0], views[1], views[2], views[3], level, threads);
}

void attention_backward(const Shape* shape, const View* views, const float* level, int half, int threads) {
  const View *v = views;
  half ? backward<bf16>(*shape, v[0], v[1], v[2], v[3], v[4], level, v[5], v[6], v[7], threads)
       : backward<float>(*shape, v[0], v[1], v[2], v[3], v[4], level, v[5], v[6], v[7], threads);
}

}  // extern "C"
