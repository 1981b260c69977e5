// Products of packed weights with several rows of numbers, each weight read once from memory.
//
// A matrix is cut into panels of 64 rows in which the 64 entries of one column lie side by side: four vectors hold
// one column, are multiplied with one number of the operand, and no sum across a vector is ever needed.
//
//   fp32  a panel is cols x 64 floats
//   bf16  cols/2 x 64 pairs of neighbouring columns; widened to fp32, the operand stays fp32
//   int8  64 fp32 row scales, then cols/4 x 64 groups of four columns, each weight stored plus 128; the operand
//         is rounded to 15 bits and cut into two signed bytes, so that only the weights are coarse
//
// Up to six rows of operands share a pass over a panel, with all their sums in registers; further passes find the
// panel in the cache, while all passes together fetch the next one, so that the memory never waits for arithmetic.
// (bf16 products by the processor, vdpbf16ps, take four times as long as an fp32 one where we measured it.) Every sum is taken by one thread in the order of the columns: neither the number of threads
// nor that of the other rows changes a bit of the result. Rows are padded to 64, columns to 4, with zeros.
#pragma once

#include "native_vectors.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

enum class Kind { fp32, bf16, int8 };

constexpr int kVectors = 4;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kAhead = 16384;  // bytes fetched before their use where one pass does
constexpr int32_t kUpper = int32_t(0xFFFF0000);

// Rows in a pass: 24 vectors of sums where there are 32 registers of that size.
#if defined(__AVX512F__)
template <Kind K>
constexpr int kBlock = K == Kind::int8 ? 3 : 6;
#else
template <Kind K>
constexpr int kBlock = 1;
#endif

template <Kind K>
constexpr int64_t panel_bytes(int64_t cols) {
  return kPanel * (K == Kind::fp32 ? 4 * cols : K == Kind::bf16 ? 2 * cols : 4 + cols);
}

// Rows of operands; for int8 matrices also q = 128 high + low with x = scale q.
struct Operands {
  const float* x;
  int64_t stride, rows;
  std::vector<int8_t> high, low;
  std::vector<int32_t> high_sum, low_sum;
  std::vector<float> scale;

  template <Kind K>
  void set(const float* from, int64_t from_stride, int64_t count, int64_t cols) {
    x = from, stride = from_stride, rows = count;
#if defined(__AVX512VNNI__)
    if (K == Kind::int8) split(cols);
#endif
  }

  int64_t split_stride = 0;

  void split(int64_t cols) {
    split_stride = round_up(cols, kLanes);
    high.resize(rows * split_stride), low.resize(rows * split_stride);
    high_sum.resize(rows), low_sum.resize(rows), scale.resize(rows);
    for (int64_t row = 0; row < rows; ++row) split_row(row, cols);
  }

  void split_row(int64_t row, int64_t cols) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    const float* from = x + row * stride;
    Vec most = {};
    for (int64_t i = 0; i < cols; i += kLanes) {
      const Vec v = load_part(from + i, cols - i);
      most = larger(most, larger(v, -v));
    }
    const float top_value = largest(most);
    scale[row] = top_value > 0 ? top_value / (127 * 128) : 1.0f;
    Ints high_total = {}, low_total = {};
    for (int64_t i = 0; i < cols; i += kLanes) {
      const Ints q = nearest(load_part(from + i, cols - i) / scale[row]), top = (q + 64) >> 7, rest = q - 128 * top;
      const Bytes tops = __builtin_convertvector(top, Bytes), rests = __builtin_convertvector(rest, Bytes);
      std::memcpy(&high[row * split_stride + i], &tops, sizeof tops);
      std::memcpy(&low[row * split_stride + i], &rests, sizeof rests);
      high_total += top, low_total += rest;
    }
    high_sum[row] = low_sum[row] = 0;
    for (int64_t i = 0; i < kLanes; ++i) high_sum[row] += high_total[i], low_sum[row] += low_total[i];
  }
};

// total += column of 64 weights times one number of each row; inlined so that the sums stay in registers.
template <int R>
[[gnu::always_inline]] inline void add_column(Vec (&total)[R][kVectors], const Vec (&column)[kVectors],
                                              const float* numbers, int64_t stride) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const float number = numbers[r * stride];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) total[r][j] += column[j] * number;
  }
}

// Ask for `Lines` cache lines and move on by them.
template <int Lines>
[[gnu::always_inline]] inline void fetch(const char*& next) {
#pragma GCC unroll 4
  for (int i = 0; i < Lines; ++i) __builtin_prefetch(next + 64 * i, 0, 2);
  next += 64 * Lines;
}

// sums[row][vector] of a panel and R rows of operands from `first` on; meanwhile `next` is fetched, Lines a step.
template <Kind K, int R, int Lines>
inline void product(const char* panel, const char* next, const Operands& operands, int64_t first, int64_t cols,
                    Vec (*sums)[kVectors]) {
  const float* x = operands.x + first * operands.stride;
  const int64_t stride = operands.stride;
  Vec total[R][kVectors] = {};
  if constexpr (K == Kind::fp32) {
    for (int64_t k = 0; k < cols; ++k, panel += kPanel * 4) {
      fetch<Lines>(next);
      Vec column[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) column[j] = load<Vec>(panel + 64 * j);
      add_column(total, column, x + k, stride);
    }
  } else if constexpr (K == Kind::bf16) {
    for (int64_t k = 0; k < cols; k += 2, panel += kPanel * 4) {
      fetch<Lines>(next);
      Vec even[kVectors], odd[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Ints pair = load<Ints>(panel + 64 * j);
        even[j] = as_floats(pair << 16), odd[j] = as_floats(pair & kUpper);
      }
      add_column(total, even, x + k, stride);
      add_column(total, odd, x + k + 1, stride);
    }
  } else {
    const char* scales = panel;
    panel += kPanel * 4;
#if defined(__AVX512VNNI__)
    __m512i high[R][kVectors] = {}, low[R][kVectors] = {};
    const int64_t step = operands.split_stride;
    const int8_t *tops = &operands.high[first * step], *rests = &operands.low[first * step];
    for (int64_t k = 0; k < cols; k += 4, panel += kPanel * 4) {
      fetch<Lines>(next);
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load<__m512i>(panel + 64 * j);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) {
        const __m512i top = _mm512_set1_epi32(load<int32_t>(tops + r * step + k));
        const __m512i rest = _mm512_set1_epi32(load<int32_t>(rests + r * step + k));
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          high[r][j] = _mm512_dpbusd_epi32(high[r][j], w[j], top);
          low[r][j] = _mm512_dpbusd_epi32(low[r][j], w[j], rest);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kVectors; ++j) {
        const Vec top = to_floats(load<Ints>(&high[r][j]) - 128 * operands.high_sum[first + r]);
        const Vec rest = to_floats(load<Ints>(&low[r][j]) - 128 * operands.low_sum[first + r]);
        total[r][j] = (top * 128.0f + rest) * (load<Vec>(scales + 64 * j) * operands.scale[first + r]);
      }
#else
    for (int64_t k = 0; k < cols; k += 4, panel += kPanel * 4)
      for (int part = 0; part < 4; ++part) {
        Vec column[kVectors];
        for (int j = 0; j < kVectors; ++j)
          column[j] = to_floats(((load<Ints>(panel + 64 * j) >> (8 * part)) & 255) - 128);
        add_column(total, column, x + k + part, stride);
      }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kVectors; ++j) total[r][j] *= load<Vec>(scales + 64 * j);
#endif
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[r][j] = total[r][j];
}

// The same for a number of rows that is known at run time only. Rows are dealt out evenly, so that a pass of several
// has at least half a block.
template <Kind K, int Lines, int R = kBlock<K>>
inline void product_of(int64_t rows, const char* panel, const char* next, const Operands& x, int64_t first,
                       int64_t cols, Vec (*sums)[kVectors]) {
  if constexpr (R > (Lines == 4 ? 1 : std::max(kBlock<K> / 2, 1))) {
    if (rows < R) return product_of<K, Lines, R - 1>(rows, panel, next, x, first, cols, sums);
  }
  product<K, R, Lines>(panel, next, x, first, cols, sums);
}

// The weights, in the order in which they are used.
class Stream {
 public:
  explicit Stream(const char* at = nullptr) : at_(at) {}

  const float* floats(int64_t n) {
    const char* here = at_;
    at_ += round_up(n, kLanes) * sizeof(float);
    return reinterpret_cast<const float*>(here);
  }

  // use(row of x, number of the panel, its four vectors of results); this thread's share of the panels.
  template <Kind K, class Use>
  void panels(int64_t rows, int64_t cols, const Operands& x, Use use) {
    panels_of<K>(share(round_up(rows, kPanel) / kPanel), cols, x, use);
    skip<K>(rows, cols);
  }

  // The same of given panels, without moving on.
  template <Kind K, class Use>
  void panels_of(Span range, int64_t cols, const Operands& x, Use use) const {
    cols = round_up(cols, 4);
    const int64_t passes = (x.rows + kBlock<K> - 1) / kBlock<K>, bytes = panel_bytes<K>(cols);
    Vec sums[kBlock<K>][kVectors];
    for (int64_t p = range.first; p < range.last; ++p) {
      const char* panel = at_ + p * bytes;
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = x.rows * pass / passes, last = x.rows * (pass + 1) / passes;
        const char* next = panel + (passes == 1 ? kAhead : bytes + bytes * pass / passes);
        const auto call = passes == 1 ? product_of<K, 4> : product_of<K, 2>;
        call(last - first, panel, next, x, first, cols, sums);
        for (int64_t row = first; row < last; ++row) use(row, p, sums[row - first]);
      }
    }
  }

  template <Kind K>
  void skip(int64_t rows, int64_t cols) {
    at_ += round_up(rows, kPanel) / kPanel * panel_bytes<K>(round_up(cols, 4));
  }

 private:
  const char* at_;
};

}  // namespace
