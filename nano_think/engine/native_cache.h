// Keys and values of one row, kept as tiles of 16, and attention to them.
//
// A tile holds 16 positions of the keys or 16 coordinates of the values side by side, so that a vector is one column
// of 16 results, as in the weights. Beside weights of 8 or 16 bits the entries have 16 bits.
#pragma once

#include <limits>
#include <type_traits>

#include "native_products.h"

namespace {

template <Kind K>
using Cached = std::conditional_t<K == Kind::fp32, float, uint16_t>;

// 16 rows of a tile times x; `cols` is a multiple of 4.
template <class Entry>
inline Vec dot(const Entry* tile, const float* x, int64_t cols) {
  Vec a = {}, b = {}, c = {}, d = {};
  if constexpr (sizeof(Entry) == 4) {
    for (int64_t k = 0; k < cols; k += 4, tile += 4 * kLanes) {
      a += load<Vec>(tile) * x[k];
      b += load<Vec>(tile + kLanes) * x[k + 1];
      c += load<Vec>(tile + 2 * kLanes) * x[k + 2];
      d += load<Vec>(tile + 3 * kLanes) * x[k + 3];
    }
  } else {
    for (int64_t k = 0; k < cols; k += 4, tile += 4 * kLanes) {
      const Ints first = load<Ints>(tile), second = load<Ints>(tile + 2 * kLanes);
      a += as_floats(first << 16) * x[k];
      b += as_floats(first & kUpper) * x[k + 1];
      c += as_floats(second << 16) * x[k + 2];
      d += as_floats(second & kUpper) * x[k + 3];
    }
  }
  return (a + b) + (c + d);
}

// Write one entry of a tile, rounded to nearest even; 16-bit tiles hold pairs of neighbouring columns.
inline void put_entry(float* tile, int64_t lane, int64_t k, float value) { tile[k * kLanes + lane] = value; }

inline void put_entry(uint16_t* tile, int64_t lane, int64_t k, float value) {
  const uint32_t bits = load<uint32_t>(&value);
  tile[(k / 2 * kLanes + lane) * 2 + k % 2] = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Rotary angles of one position: `dim` coordinates in pairs.
struct Rotation {
  const float *cos, *sin;
  int64_t dim, interleaved;

  Rotation(const float* table, int64_t max_len, int64_t position, int64_t dim, int64_t interleaved)
      : cos(table + position * (dim / 2)), sin(cos + max_len * (dim / 2)), dim(dim), interleaved(interleaved) {}

  void operator()(const float* from, float* to, float factor) const {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
      const float first = from[a], second = from[b];
      to[a] = (first * cos[i] - second * sin[i]) * factor;
      to[b] = (second * cos[i] + first * sin[i]) * factor;
    }
  }
};

// What one group of heads of one row remembers: keys of `width` numbers, values of `depth`.
template <class Entry>
struct KeysValues {
  Entry *keys, *values;
  int64_t width, depth, length;  // width a multiple of 4, length of 16

  static int64_t key_size(int64_t width, int64_t length) { return round_up(width, 4) * round_up(length, kLanes); }
  static int64_t value_size(int64_t depth, int64_t length) { return round_up(depth, kLanes) * round_up(length, kLanes); }

  void remember(int64_t position, const float* key, int64_t key_width, const float* value) const {
    for (int64_t k = 0; k < key_width; ++k)
      put_entry(keys + position / kLanes * kLanes * width, position % kLanes, k, key[k]);
    for (int64_t k = 0; k < depth; ++k)
      put_entry(values + k / kLanes * kLanes * length, k % kLanes, position, value[k]);
  }

  // softmax(keys query) values over the first `count` positions, to `mixed`. scores: room for `length`.
  void attend(const float* query, int64_t count, float* scores, float* mixed) const {
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    const int64_t padded = round_up(count, kLanes);
    Vec most = Vec{} + nothing;
    for (int64_t p = 0; p < padded; p += kLanes) {
      store(scores + p, dot(keys + p * width, query, width));
      if (p + kLanes > count) std::fill(scores + count, scores + padded, nothing);
      most = larger(load<Vec>(scores + p), most);
    }
    const float top = largest(most);
    Vec total = {};
    for (int64_t p = 0; p < padded; p += kLanes) {
      const Vec v = exp_(load<Vec>(scores + p) - top);
      store(scores + p, v);
      total += v;
    }
    std::fill(scores + count, scores + padded, 0.0f);
    const float part = 1.0f / sum(total);
    for (int64_t k = 0; k < depth; k += kLanes)
      store_part(mixed + k, dot(values + k * length, scores, round_up(count, 4)) * part, depth - k);
  }
};

}  // namespace
