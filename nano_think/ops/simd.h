// Vectors of floats for the kernels of the state-space mixers: one source for AVX-512, AVX, SSE and NEON, with
// the elementary functions they need to a few units in the last place.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "same size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bf16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return bits_of<Vec>(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, Vec v) {  // to nearest, ties to even
  Words words = bits_of<Words>(v);
  words = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  words = v != v ? Words{} + 0x7fc0u : words;
  const Halves halves = __builtin_convertvector(words, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

// The first `count` lanes only, where fewer than kLanes are there; the others are 0.
template <class T>
inline Vec load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store(T* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

inline float scalar(float value) { return value; }
inline float scalar(bf16 value) { return bits_of<float>(uint32_t(value.bits) << 16); }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float parts[kLanes];
  std::memcpy(parts, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
#endif
}

// 1 / v to one unit in the last place, for normal numbers with a normal reciprocal. A division takes five times
// as long, and there is only one divider.
inline Vec reciprocal(Vec v) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)v);
  return guess * (2.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

// 2^z with a relative error below 2e-7, exactly 1 at 0; results below the smallest normal number may be zero,
// NaN stays NaN. The distance to the next integer goes through a minimax polynomial of relative error 1e-7.
inline Vec exp2_(Vec z) {
#if defined(__AVX512DQ__)
  const Vec r = (Vec)_mm512_reduce_ps((__m512)z, 8);  // z - nearest integer
#else
  z = z < -126.0f ? Vec{} - 127.0f : z;
  z = z > 127.0f ? Vec{} + 127.0f : z;
  const Vec shifted = z + 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer in the low bits
  const Vec r = z - (shifted - 12582912.0f);
#endif
  Vec p = r * 1.32647271e-3f + 9.67151286e-3f;
  p = p * r + 5.55073375e-2f;
  p = p * r + 2.40222421e-1f;
  p = p * r + 6.93146978e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(z - r));
#else
  return p * bits_of<Vec>((bits_of<Words>(shifted) << 23) + 0x3f800000u);  // the exponent of -127 is that of 0
#endif
}

// exp(-|v|), which no v makes overflow.
inline Vec exp_below(Vec v) {
  const Vec below = v < 0.0f ? v : -v;
  return exp2_((below < -120.0f ? Vec{} - 120.0f : below) * kLog2e);
}

inline Vec sigmoid(Vec v) {
  const Vec e = exp_below(v), larger = reciprocal(1.0f + e);
  return v < 0.0f ? e * larger : larger;
}

// log(1 + exp(v)) and its derivative, both exactly 0 at -infinity.
// log(1 + e) = 2 atanh(q) with q = e / (2 + e) <= 1/3 loses nothing where e is small.
inline Vec softplus(Vec v, Vec* slope) {
  const Vec e = v < -120.0f ? Vec{} : exp_below(v);
  const Vec both = reciprocal((1.0f + e) * (2.0f + e)), larger = (2.0f + e) * both;
  const Vec q = e * (1.0f + e) * both, s = q * q;
  Vec p = s * 1.40059965e-1f + 1.40009021e-1f;
  p = p * s + 2.00107637e-1f;
  p = p * s + 3.33332081e-1f;
  p = p * s + 1.0f;
  *slope = v < 0.0f ? e * larger : larger;
  return (v < 0.0f ? Vec{} : v) + 2.0f * q * p;
}

}  // namespace
