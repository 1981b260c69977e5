// What a training step does between its matrix products, each in one pass over memory: softmax and its gradient
// in attention and in the head's loss, SwiGLU, RMS norm, rotary positions. Activations are fp32 or bf16, arithmetic
// and weights fp32.
//
// Rows are independent. Sums over rows (a norm's gain) are made in kParts parts, whatever the number of threads, so
// that it changes no bit.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t kParts = 16;    // partial sums over rows
constexpr int64_t kPiece = 4096;  // elements one thread takes at a time where there are no rows
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The first `count` lanes from memory, the others `fill`.
template <class T>
inline Vec load_part(const T* p, int64_t count, float fill) {
  if (count >= kLanes) return load(p);
  float parts[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) parts[i] = i < count ? scalar(p[i]) : fill;
  return load(parts);
}

inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float parts[kLanes];
  std::memcpy(parts, &v, sizeof v);
  return *std::max_element(parts, parts + kLanes);
#endif
}

// e[i] = exp(z[i] * scale - max) with their sum; `bias` (or null) is added to the last `columns` of z. e may be z.
template <class T, class E>
inline float exponentials(const T* z, E* e, int64_t n, float scale, const T* bias, int64_t columns, float* max) {
  const int64_t plain = n - columns;
  const auto at = [&](int64_t i) {
    Vec v = load_part(z + i, n - i, -kInfinity) * scale;
    if (bias && i >= plain && i + kLanes <= n) {
      v += load(bias + i - plain);
    } else if (bias && i + kLanes > plain) {
      float parts[kLanes];
      for (int64_t j = 0; j < kLanes; ++j)
        parts[j] = i + j >= plain && i + j < n ? scalar(bias[i + j - plain]) : 0.0f;
      v += load(parts);
    }
    return v;
  };
  Vec top = Vec{} - kInfinity;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = at(i);
    top = v > top ? v : top;
  }
  *max = largest(top);
  Vec total = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec exponential = exp2_((at(i) - *max) * kLog2e);
    total += exponential;
    store(e + i, exponential, n - i);
  }
  return sum(total);
}

// Logits to softmax - one-hot in place, and the loss.
template <class T>
float softmax_minus_one_hot(T* z, int64_t n, int64_t label, float* scratch) {
  const float logit = scalar(z[label]);
  float max;
  const float total = exponentials<T, float>(z, scratch, n, 1.0f, nullptr, 0, &max);
  const float inverse = 1.0f / total;
  scratch[label] -= total;
  for (int64_t i = 0; i < n; i += kLanes) store(z + i, load_part(scratch + i, n - i, 0.0f) * inverse, n - i);
  return (max - logit) + std::log(total);
}

template <class T>
void head_losses(T* z, const int64_t* labels, float* losses, int64_t rows, int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(n);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row)
      losses[row] = softmax_minus_one_hot(z + row * n, n, labels[row], scratch.data());
  }
}

template <class T>
void attention_forward(T* z, const T* bias, int64_t rows, int64_t n, int64_t queries, int64_t columns, float scale,
                       int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(n);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      T* p = z + row * n;
      float max;
      const T* own = bias + row % queries * columns;
      const float inverse = 1.0f / exponentials<T, float>(p, scratch.data(), n, scale, own, columns, &max);
      for (int64_t i = 0; i < n; i += kLanes)
        store(p + i, load_part(scratch.data() + i, n - i, 0.0f) * inverse, n - i);
    }
  }
}

// dp to the gradient of the scores, scale p (dp - sum(p dp)), in place.
template <class T>
void attention_backward(const T* p, T* dp, int64_t rows, int64_t n, float scale, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const T* own = p + row * n;
    T* d = dp + row * n;
    Vec total = {};
    for (int64_t i = 0; i < n; i += kLanes) total += load_part(own + i, n - i, 0.0f) * load_part(d + i, n - i, 0.0f);
    const float mean = sum(total);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec share = load_part(own + i, n - i, 0.0f) * scale;
      store(d + i, share * (load_part(d + i, n - i, 0.0f) - mean), n - i);
    }
  }
}

template <class T>
void swiglu_forward(const T* gate, const T* up, T* out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < n; first += kPiece)
    for (int64_t i = first; i < std::min(n, first + kPiece); i += kLanes) {
      const Vec g = load_part(gate + i, n - i, 0.0f);
      store(out + i, g * sigmoid(g) * load_part(up + i, n - i, 0.0f), n - i);
    }
}

template <class T>
void swiglu_backward(const T* gate, const T* up, const T* dout, T* dgate, T* dup, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < n; first += kPiece)
    for (int64_t i = first; i < std::min(n, first + kPiece); i += kLanes) {
      const Vec g = load_part(gate + i, n - i, 0.0f), d = load_part(dout + i, n - i, 0.0f);
      const Vec s = sigmoid(g), open = g * s;
      store(dup + i, d * open, n - i);
      store(dgate + i, d * load_part(up + i, n - i, 0.0f) * (s + open * (1.0f - s)), n - i);
    }
}

// y = x r w with r = 1 / sqrt(mean(x^2) + eps); w may be null.
template <class T, class O>
void norm_forward(const T* x, const float* w, O* y, float* inverse, int64_t rows, int64_t n, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const T* own = x + row * n;
    Vec total = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec v = load_part(own + i, n - i, 0.0f);
      total += v * v;
    }
    const float r = inverse[row] = 1.0f / std::sqrt(sum(total) / float(n) + eps);
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec v = load_part(own + i, n - i, 0.0f) * r;
      if (w) v *= load_part(w + i, n - i, 0.0f);
      store(y + row * n + i, v, n - i);
    }
  }
}

// With h = x r and the gradient g = dy w of h: dx = r (g - h mean(g h)); dw (kParts, n) gathers dy h of its rows.
template <class T, class O>
void norm_backward(const T* x, const float* w, const float* inverse, const O* dy, T* dx, float* dw, int64_t rows,
                   int64_t n, int threads) {
  const int64_t share = (rows + kParts - 1) / kParts;
#pragma omp parallel for num_threads(threads)
  for (int64_t part = 0; part < kParts; ++part) {
    float* gain = w ? dw + part * n : nullptr;
    if (gain) std::fill(gain, gain + n, 0.0f);
    for (int64_t row = part * share; row < std::min(rows, (part + 1) * share); ++row) {
      const T* own = x + row * n;
      const O* d = dy + row * n;
      const float r = inverse[row];
      Vec total = {};
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec h = load_part(own + i, n - i, 0.0f) * r, product = load_part(d + i, n - i, 0.0f) * h;
        if (gain) {
          store(gain + i, load_part(gain + i, n - i, 0.0f) + product, n - i);
          total += product * load_part(w + i, n - i, 0.0f);
        } else {
          total += product;
        }
      }
      const float mean = sum(total) / float(n);
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec h = load_part(own + i, n - i, 0.0f) * r;
        Vec g = load_part(d + i, n - i, 0.0f);
        if (gain) g *= load_part(w + i, n - i, 0.0f);
        store(dx + row * n + i, (g - h * mean) * r, n - i);
      }
    }
  }
}

// x (batch, heads, length, 2 half) by its steps, its last axis dense.
struct Rotated {
  int64_t batch, heads, length, half;
  int64_t steps[3];      // of x from row to row, head to head, position to position
  int64_t angles_of_row;  // from the angles of a row to the next one's, 0 where all have the same
};

// (a c - b s, b c + a s) of one vector's pairs, which lie side by side or half a vector apart; out may not be x.
template <class T>
inline void rotate_pairs(const T* x, const float* cos, const float* sin, T* out, int64_t half, float sign,
                         bool side_by_side) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, half - i);
    const Vec c = load(cos + i, count), s = load(sin + i, count) * sign;
    if (!side_by_side) {
      const Vec a = load(x + i, count), b = load(x + half + i, count);
      store(out + i, a * c - b * s, count);
      store(out + half + i, b * c + a * s, count);
      continue;
    }
    float first[kLanes] = {}, second[kLanes] = {}, both[2 * kLanes];
    for (int64_t j = 0; j < count; ++j) first[j] = scalar(x[2 * (i + j)]), second[j] = scalar(x[2 * (i + j) + 1]);
    const Vec a = load(first), b = load(second);
    store(first, a * c - b * s);
    store(second, b * c + a * s);
    for (int64_t j = 0; j < kLanes; ++j) both[2 * j] = first[j], both[2 * j + 1] = second[j];
    store(out + 2 * i, load(both), 2 * count);
    if (2 * count > kLanes) store(out + 2 * i + kLanes, load(both + kLanes), 2 * count - kLanes);
  }
}

template <class T>
void rotate(const T* x, const float* cos, const float* sin, T* out, const Rotated& r, float sign, bool side_by_side,
            int threads) {
  const int64_t heads = r.batch * r.heads;
#pragma omp parallel for num_threads(threads)
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t row = head / r.heads, width = 2 * r.half;
    const T* own = x + row * r.steps[0] + head % r.heads * r.steps[1];
    const int64_t angle = row * r.angles_of_row;
    for (int64_t t = 0; t < r.length; ++t)
      rotate_pairs(own + t * r.steps[2], cos + angle + t * r.half, sin + angle + t * r.half,
                   out + (head * r.length + t) * width, r.half, sign, side_by_side);
  }
}

}  // namespace

extern "C" {

void rotate(const void* x, const float* cos, const float* sin, void* out, const Rotated* shape, float sign,
            int side_by_side, int half, int threads) {
  half ? rotate((const bf16*)x, cos, sin, (bf16*)out, *shape, sign, side_by_side, threads)
       : rotate((const float*)x, cos, sin, (float*)out, *shape, sign, side_by_side, threads);
}

int64_t norm_parts() { return kParts; }

void head_losses(void* z, const int64_t* labels, float* losses, int64_t rows, int64_t n, int half, int threads) {
  half ? head_losses((bf16*)z, labels, losses, rows, n, threads)
       : head_losses((float*)z, labels, losses, rows, n, threads);
}

void attention_forward(void* z, const void* bias, int64_t rows, int64_t n, int64_t queries, int64_t columns,
                       float scale, int half, int threads) {
  half ? attention_forward((bf16*)z, (const bf16*)bias, rows, n, queries, columns, scale, threads)
       : attention_forward((float*)z, (const float*)bias, rows, n, queries, columns, scale, threads);
}

void attention_backward(const void* p, void* dp, int64_t rows, int64_t n, float scale, int half, int threads) {
  half ? attention_backward((const bf16*)p, (bf16*)dp, rows, n, scale, threads)
       : attention_backward((const float*)p, (float*)dp, rows, n, scale, threads);
}

void swiglu_forward(const void* gate, const void* up, void* out, int64_t n, int half, int threads) {
  half ? swiglu_forward((const bf16*)gate, (const bf16*)up, (bf16*)out, n, threads)
       : swiglu_forward((const float*)gate, (const float*)up, (float*)out, n, threads);
}

void swiglu_backward(const void* gate, const void* up, const void* dout, void* dgate, void* dup, int64_t n, int half,
                     int threads) {
  half ? swiglu_backward((const bf16*)gate, (const bf16*)up, (const bf16*)dout, (bf16*)dgate, (bf16*)dup, n, threads)
       : swiglu_backward((const float*)gate, (const float*)up, (const float*)dout, (float*)dgate, (float*)dup, n,
                         threads);
}

void norm_forward(const void* x, const float* w, void* y, float* inverse, int64_t rows, int64_t n, float eps,
                  int half_in, int half_out, int threads) {
  if (half_in && half_out) norm_forward((const bf16*)x, w, (bf16*)y, inverse, rows, n, eps, threads);
  if (half_in && !half_out) norm_forward((const bf16*)x, w, (float*)y, inverse, rows, n, eps, threads);
  if (!half_in && half_out) norm_forward((const float*)x, w, (bf16*)y, inverse, rows, n, eps, threads);
  if (!half_in && !half_out) norm_forward((const float*)x, w, (float*)y, inverse, rows, n, eps, threads);
}

void norm_backward(const void* x, const float* w, const float* inverse, const void* dy, void* dx, float* dw,
                   int64_t rows, int64_t n, int half_in, int half_out, int threads) {
  if (half_in && half_out)
    norm_backward((const bf16*)x, w, inverse, (const bf16*)dy, (bf16*)dx, dw, rows, n, threads);
  if (half_in && !half_out)
    norm_backward((const bf16*)x, w, inverse, (const float*)dy, (bf16*)dx, dw, rows, n, threads);
  if (!half_in && half_out)
    norm_backward((const float*)x, w, inverse, (const bf16*)dy, (float*)dx, dw, rows, n, threads);
  if (!half_in && !half_out)
    norm_backward((const float*)x, w, inverse, (const float*)dy, (float*)dx, dw, rows, n, threads);
}

}  // extern "C"
