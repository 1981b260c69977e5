// Causal depthwise convolution over documents, forward and backward:
//
//   y[t] = bias + sum_j weight[j] x[t - j] over the taps j for which t - j lies in the row and in t's document.
//
// x, y (batch, length, channels) are fp32 or bf16, x with `x_step` elements between positions; weight (taps,
// channels) with the current position first, bias (channels), all arithmetic fp32; segments (batch, length) int64
// or null. The gradients of weight (batch, taps, channels) and bias (batch, channels) are summed by the caller.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kGroup = 128;  // channels one thread works on at a time

struct bf16 {
  uint16_t bits;
};

inline float read(float value) { return value; }
inline float read(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void write(float* to, float value) { *to = value; }
inline void write(bf16* to, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = uint16_t(value != value ? 0x7fc0u : rounded);
}

struct Shape {
  int64_t batch, length, channels, taps, x_step;
};

// A group of channels of one row; its members begin at the first channel of the group.
template <class T>
struct Part {
  const Shape& s;
  int64_t row, first, width;
  const float* weight;
  const int64_t* segments;

  Part(const Shape& s, int64_t part, const float* weight, const int64_t* segments)
      : s(s), weight(weight) {
    const int64_t groups = (s.channels + kGroup - 1) / kGroup;
    row = part / groups;
    first = part % groups * kGroup;
    width = std::min(kGroup, s.channels - first);
    this->segments = segments ? segments + row * s.length : nullptr;
    this->weight += first;
  }

  const T* input(const T* x, int64_t t) const { return x + (row * s.length + t) * s.x_step + first; }
  T* output(T* y, int64_t t) const { return y + (row * s.length + t) * s.channels + first; }
  const T* output(const T* y, int64_t t) const { return y + (row * s.length + t) * s.channels + first; }
  bool reaches(int64_t t, int64_t j) const {  // may position t read position t - j?
    return t < s.length && t >= j && (!segments || segments[t] == segments[t - j]);
  }

  void forward(const T* x, const float* bias, T* y) const {
    float sums[kGroup];
    for (int64_t t = 0; t < s.length; ++t) {
      std::copy(bias + first, bias + first + width, sums);
      for (int64_t j = 0; j < s.taps; ++j) {
        if (!reaches(t, j)) continue;
        const T* from = input(x, t - j);
        for (int64_t c = 0; c < width; ++c) sums[c] += weight[j * s.channels + c] * read(from[c]);
      }
      T* to = output(y, t);
      for (int64_t c = 0; c < width; ++c) write(to + c, sums[c]);
    }
  }

  void backward(const T* x, const T* dy, T* dx, float* dweight, float* dbias) const {
    float sums[kGroup];
    dweight += row * s.taps * s.channels + first;
    dbias += row * s.channels + first;
    for (int64_t j = 0; j < s.taps; ++j) std::fill_n(dweight + j * s.channels, width, 0.0f);
    std::fill_n(dbias, width, 0.0f);
    for (int64_t t = 0; t < s.length; ++t) {
      std::fill_n(sums, width, 0.0f);
      const T *grad = output(dy, t);
      for (int64_t c = 0; c < width; ++c) dbias[c] += read(grad[c]);
      for (int64_t j = 0; j < s.taps; ++j) {
        if (reaches(t + j, j)) {
          const T* later = output(dy, t + j);
          for (int64_t c = 0; c < width; ++c) sums[c] += weight[j * s.channels + c] * read(later[c]);
        }
        if (reaches(t, j)) {
          const T* from = input(x, t - j);
          float* to = dweight + j * s.channels;
          for (int64_t c = 0; c < width; ++c) to[c] += read(grad[c]) * read(from[c]);
        }
      }
      T* to = output(dx, t);
      for (int64_t c = 0; c < width; ++c) write(to + c, sums[c]);
    }
  }
};

// Parts share nothing, so that the number of threads changes no bit.
template <class T, class Work>
void for_all_parts(const Shape& s, const float* weight, const int64_t* segments, int threads, Work work) {
  const int64_t parts = s.batch * ((s.channels + kGroup - 1) / kGroup);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) work(Part<T>(s, part, weight, segments));
}

template <class T>
void forward(const Shape& s, const void* x, const float* weight, const float* bias, const int64_t* segments,
             void* y, int threads) {
  for_all_parts<T>(s, weight, segments, threads, [&](const Part<T>& part) {
    part.forward(static_cast<const T*>(x), bias, static_cast<T*>(y));
  });
}

template <class T>
void backward(const Shape& s, const void* x, const float* weight, const int64_t* segments, const void* dy,
              void* dx, float* dweight, float* dbias, int threads) {
  for_all_parts<T>(s, weight, segments, threads, [&](const Part<T>& part) {
    part.backward(static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx), dweight, dbias);
  });
}

}  // namespace

extern "C" {

void conv_forward(const void* x, const float* weight, const float* bias, const int64_t* segments, void* y,
                  int64_t batch, int64_t length, int64_t channels, int64_t taps, int64_t x_step, int half,
                  int threads) {
  const Shape s{batch, length, channels, taps, x_step};
  (half ? forward<bf16> : forward<float>)(s, x, weight, bias, segments, y, threads);
}

void conv_backward(const void* x, const float* weight, const int64_t* segments, const void* dy, void* dx,
                   float* dweight, float* dbias, int64_t batch, int64_t length, int64_t channels, int64_t taps,
                   int64_t x_step, int half, int threads) {
  const Shape s{batch, length, channels, taps, x_step};
  (half ? backward<bf16> : backward<float>)(s, x, weight, segments, dy, dx, dweight, dbias, threads);
}
}
