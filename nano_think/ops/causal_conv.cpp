// Causal depthwise convolution over documents, with the SiLU behind it where asked for, forward and backward:
//
//   a[t] = bias + sum_j weight[j] x[t - j] over the taps j for which t - j lies in the row and in t's document,
//   y[t] = a[t] or a[t] sigmoid(a[t]).
//
// x, y (batch, length, channels) are fp32 or bf16, x with `x_step` elements between positions; weight (taps,
// channels) with the current position first, bias (channels), all arithmetic fp32; segments (batch, length) int64
// or null. The gradients of weight (batch, taps, channels) and bias (batch, channels) are summed by the caller.
// The backward pass computes a[t] again: that is cheaper than to read it from memory.

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t kGroup = 384;               // channels one thread works on at a time
constexpr int64_t kBlocks = kGroup / kLanes;  // and their vectors
constexpr int64_t kAhead = 2;                 // positions between what is asked for from memory and what is computed

struct Shape {
  int64_t batch, length, channels, taps, x_step;
  const float *weight, *bias;
  const int64_t* segments;
  bool silu;
};

// Where one tap of the current position finds what it needs, at the first channel of the group.
template <class T>
struct Tap {
  const Vec* weight;
  Vec* sums;        // of its weight's gradient
  const T* x;       // the input it reads
  const Vec* later; // the gradient that reaches the current input through it
};

// A group of channels of one row; weights and sums lie in whole vectors, the last of which may be partly unused.
template <class T>
struct Part {
  const Shape& s;
  int64_t row, first, width, blocks;
  std::vector<Vec> weight, bias;           // (tap, block), (block)
  std::vector<Vec> weight_sums, bias_sums;
  std::vector<Vec> ring;                   // gradients of the last `taps` sums a[t]: an input's is made of as many
  std::vector<Tap<T>> open;

  Part(const Shape& s, int64_t part)
      : s(s), weight(s.taps * kBlocks), bias(kBlocks), weight_sums(s.taps * kBlocks), bias_sums(kBlocks),
        ring(s.taps * kBlocks) {
    const int64_t groups = (s.channels + kGroup - 1) / kGroup;
    row = part / groups;
    first = part % groups * kGroup;
    width = std::min(kGroup, s.channels - first);
    blocks = (width + kLanes - 1) / kLanes;
    for (int64_t b = 0; b < blocks; ++b) {
      bias[b] = load(s.bias + first + b * kLanes, left(b));
      for (int64_t j = 0; j < s.taps; ++j)
        weight[j * kBlocks + b] = load(s.weight + j * s.channels + first + b * kLanes, left(b));
    }
  }

  int64_t left(int64_t block) const { return width - block * kLanes; }
  int64_t at(int64_t t) const { return (row * s.length + t) * s.channels + first; }  // of an output
  int64_t input(int64_t t) const { return (row * s.length + t) * s.x_step + first; }
  Vec* kept(int64_t t) { return &ring[t % s.taps * kBlocks]; }

  bool reaches(int64_t t, int64_t j) const {  // may position t read position t - j?
    const int64_t* segments = s.segments + row * s.length;
    return t < s.length && t >= j && (!s.segments || segments[t] == segments[t - j]);
  }

  void open_taps(int64_t t, const T* x) {  // those by which position t reads
    open.clear();
    for (int64_t j = 0; j < s.taps; ++j)
      if (reaches(t, j))
        open.push_back({&weight[j * kBlocks], &weight_sums[j * kBlocks], x + input(t - j), nullptr});
  }

  void open_readers(int64_t t) {  // those by which position t is read
    open.clear();
    for (int64_t j = 0; j < s.taps; ++j)
      if (reaches(t + j, j)) open.push_back({&weight[j * kBlocks], nullptr, nullptr, kept(t + j)});
  }

  // `work` with the open taps; where they are as many as usual, as a copy whose loops are unrolled.
  template <class Work>
  void with_taps(Work work) const {
    if (open.size() == 4)
      work(std::array<Tap<T>, 4>{open[0], open[1], open[2], open[3]});
    else
      work(open);
  }

  template <class Taps>
  Vec sum(const Taps& taps, int64_t b) const {
    Vec total = bias[b];
    for (const Tap<T>& tap : taps) total += tap.weight[b] * load(tap.x + b * kLanes, left(b));
    return total;
  }

  // A position's channels are a short run of memory far from the next one: no processor foresees where it begins.
  // Behind the last position this asks in vain, which is allowed.
  static void fetch(const T* run, int64_t b) { __builtin_prefetch(run + b * kLanes); }

  void forward(const T* x, T* y) {
    for (int64_t t = 0; t < s.length; ++t) {
      open_taps(t, x);
      with_taps([&](const auto& taps) {
        for (int64_t b = 0; b < blocks; ++b) {
          fetch(x + input(t + kAhead), b);
          fetch(y + at(t + kAhead), b);
          const Vec a = sum(taps, b);
          store(y + at(t) + b * kLanes, s.silu ? a * sigmoid(a) : a, left(b));
        }
      });
    }
  }

  void backward(const T* x, const T* dy, T* dx, float* dweight, float* dbias) {
    for (int64_t t = 0; t < s.length + s.taps - 1; ++t) {
      if (t < s.length) sum_gradient(t, x, dy);
      if (t >= s.taps - 1) input_gradient(t - (s.taps - 1), dx);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      store(dbias + row * s.channels + first + b * kLanes, bias_sums[b], left(b));
      for (int64_t j = 0; j < s.taps; ++j) {
        float* to = dweight + (row * s.taps + j) * s.channels + first + b * kLanes;
        store(to, weight_sums[j * kBlocks + b], left(b));
      }
    }
  }

  void sum_gradient(int64_t t, const T* x, const T* dy) {
    open_taps(t, x);
    with_taps([&, now = kept(t)](const auto& taps) {
      for (int64_t b = 0; b < blocks; ++b) {
        fetch(x + input(t + kAhead), b);
        fetch(dy + at(t + kAhead), b);
        Vec grad = load(dy + at(t) + b * kLanes, left(b));
        if (s.silu) grad *= silu_slope(sum(taps, b));
        now[b] = grad;
        bias_sums[b] += grad;
        for (const Tap<T>& tap : taps) tap.sums[b] += grad * load(tap.x + b * kLanes, left(b));
      }
    });
  }

  void input_gradient(int64_t t, T* dx) {
    open_readers(t);
    with_taps([&](const auto& taps) {
      for (int64_t b = 0; b < blocks; ++b) {
        fetch(dx + at(t + kAhead), b);
        Vec total{};
        for (const Tap<T>& tap : taps) total += tap.weight[b] * tap.later[b];
        store(dx + at(t) + b * kLanes, total, left(b));
      }
    });
  }

  static Vec silu_slope(Vec a) {
    const Vec gate = sigmoid(a);
    return gate * (1.0f + a * (1.0f - gate));
  }
};

// Parts share nothing, so that the number of threads changes no bit.
template <class T, class Work>
void for_all_parts(const Shape& s, int threads, Work work) {
  const int64_t parts = s.batch * ((s.channels + kGroup - 1) / kGroup);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t number = 0; number < parts; ++number) {
    Part<T> part(s, number);
    work(part);
  }
}

template <class T>
void forward(const Shape& s, const void* x, void* y, int threads) {
  for_all_parts<T>(s, threads, [&](Part<T>& part) { part.forward(static_cast<const T*>(x), static_cast<T*>(y)); });
}

template <class T>
void backward(const Shape& s, const void* x, const void* dy, void* dx, float* dweight, float* dbias, int threads) {
  for_all_parts<T>(s, threads, [&](Part<T>& part) {
    part.backward(static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx), dweight, dbias);
  });
}

}  // namespace

extern "C" {

void conv_forward(const void* x, const float* weight, const float* bias, const int64_t* segments, void* y,
                  int64_t batch, int64_t length, int64_t channels, int64_t taps, int64_t x_step, int silu, int half,
                  int threads) {
  const Shape s{batch, length, channels, taps, x_step, weight, bias, segments, silu != 0};
  (half ? forward<bf16> : forward<float>)(s, x, y, threads);
}

void conv_backward(const void* x, const float* weight, const float* bias, const int64_t* segments, const void* dy,
                   void* dx, float* dweight, float* dbias, int64_t batch, int64_t length, int64_t channels,
                   int64_t taps, int64_t x_step, int silu, int half, int threads) {
  const Shape s{batch, length, channels, taps, x_step, weight, bias, segments, silu != 0};
  (half ? backward<bf16> : backward<float>)(s, x, dy, dx, dweight, dbias, threads);
}
}
