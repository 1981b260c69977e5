// Vectors of 16 floats, the functions that they need, and how threads share work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int64_t kLanes = 16;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <class T, class From>
inline T load(const From* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The first `left` numbers, zeros behind them.
inline Vec load_part(const float* p, int64_t left) {
  if (left >= kLanes) return load<Vec>(p);
  Vec v = {};
  std::memcpy(&v, p, left * sizeof(float));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store_part(float* p, Vec v, int64_t left) { std::memcpy(p, &v, std::min(left, kLanes) * sizeof(float)); }
inline Vec as_floats(Ints v) { return load<Vec>(&v); }
inline Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float sum(Vec v) {
  float parts[kLanes];
  store(parts, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

inline float largest(Vec v) { return *std::max_element(&v[0], &v[0] + kLanes); }

// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum, for |z| < 2^22.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4B400000;

inline Ints nearest(Vec z) {
  const Vec shifted = z + kRounder;
  return load<Ints>(&shifted) - kRounderBits;
}

// 2^z for z clamped to [-126, 127]: the integer part goes into the exponent, the rest through the series of
// 2^f to degree 6, relative error below 2e-7.
inline Vec exp2_(Vec z) {
  z = z < -126.0f ? Vec{} - 126.0f : z;
  z = z > 127.0f ? Vec{} + 127.0f : z;
  const Ints whole = nearest(z);
  const Vec f = z - to_floats(whole);
  Vec p = 1.54035304e-4f * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return as_floats(load<Ints>(&p) + (whole << 23));
}

constexpr float kLog2e = 1.44269504f;

inline Vec exp_(Vec x) { return exp2_(x * kLog2e); }
inline Vec silu(Vec x) { return x / (1.0f + exp_(-x)); }

// log(1 + u) for 0 <= u <= 1 as 2 atanh(u / (2 + u)), whose series keeps the relative precision of a small u.
inline Vec log1p_(Vec u) {
  const Vec s = u / (2.0f + u), t = s * s;
  Vec p = t * (1.0f / 15) + 1.0f / 13;
  p = p * t + 1.0f / 11;
  p = p * t + 1.0f / 9;
  p = p * t + 1.0f / 7;
  p = p * t + 1.0f / 5;
  p = p * t + 1.0f / 3;
  return 2.0f * s * (p * t + 1.0f);
}

inline Vec softplus(Vec x) { return larger(x, Vec{}) + log1p_(exp_(x > 0.0f ? -x : x)); }

// log(exp(a) + exp(b))
inline Vec log_add_exp(Vec a, Vec b) { return larger(a, b) + log1p_(exp_(a > b ? b - a : a - b)); }

inline int64_t thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int64_t num_threads() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Where threads wait until all of them have come, so that every one finished what the next stage reads. The wait is
// short where each thread has a core: it spins, and soon gives its core away where another thread has none.
class Meeting {
 public:
  void wait() {
    const int64_t threads = num_threads();
    if (threads == 1) return;
    const int64_t now = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(now + 1, std::memory_order_release);
      return;
    }
    for (int64_t turn = 0; round_.load(std::memory_order_acquire) == now; ++turn)
      turn < kPatience ? pause() : std::this_thread::yield();
  }

 private:
  static constexpr int64_t kPatience = 1000;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::atomic<int64_t> arrived_{0}, round_{0};
};

// Rows from `first` up to, not including, `last`.
struct Span {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// This thread's part of `total` items.
inline Span share(int64_t total) {
  return {total * thread() / num_threads(), total * (thread() + 1) / num_threads()};
}

// Rows of floats, each padded with zeros to whole vectors.
struct Matrix {
  int64_t stride;
  std::vector<float> data;
  Matrix(int64_t rows, int64_t cols) : stride(round_up(cols, kLanes)), data(rows * stride) {}
  float* operator[](int64_t row) { return data.data() + row * stride; }
  const float* operator[](int64_t row) const { return data.data() + row * stride; }
};

}  // namespace
