// One token of an expert language model in one call: entry, blocks of attention or S6 with SwiGLU, tied head.
//
// At batch 1 every weight is used once a token, so the time is that of reading the weights. They come as one
// stream in the order of use and are read forwards only. A matrix is cut into tiles of 16 rows in which the 16
// entries of one column lie side by side: a vector then holds one column of 16 rows, is multiplied with one
// number of the operand, and no sum across a vector is ever needed. Keys and values are kept in the same form.
//
//   fp32  a tile is cols x 16 floats
//   bf16  cols/2 x 16 pairs of neighbouring columns; widened to fp32, the operand stays fp32
//   int8  16 fp32 row scales, then cols/4 x 16 groups of four columns, each weight stored plus 128; the operand
//         is rounded to 15 bits and cut into two signed bytes, so that only the weights are coarse
//
// Every tile is computed by one thread in one order: the number of threads changes no bit of the result.
// Rows are padded to 16, columns to 4, vectors to 16, all with zeros.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
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

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec as_floats(Ints v) { return load<Vec>(&v); }
inline Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float sum(Vec v) {
  float parts[kLanes];
  store(parts, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

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

enum class Kind { fp32, bf16, int8 };

// What a matrix is multiplied with: floats, and for int8 matrices also q = 128 high + low with x = scale q.
struct Operand {
  const float* x;
  float scale = 1;
  int32_t high_sum = 0, low_sum = 0;
  std::vector<int8_t> high, low;

  explicit Operand(const float* x) : x(x) {}

  template <Kind K>
  static Operand of(const float* x, int64_t cols) {
    Operand operand(x);
#if defined(__AVX512VNNI__)
    if (K == Kind::int8) operand.split(round_up(cols, kLanes));
#endif
    return operand;
  }

  void split(int64_t size) {
    high.resize(size), low.resize(size);
    Vec most = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec v = load<Vec>(x + i);
      most = v > most ? v : most;
      most = -v > most ? -v : most;
    }
    const float largest = *std::max_element(&most[0], &most[0] + kLanes);
    if (largest > 0) scale = largest / (127 * 128);
    for (int64_t i = 0; i < size; i += kLanes) {
      const Ints q = nearest(load<Vec>(x + i) / scale), top = (q + 64) >> 7;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        high[i + lane] = int8_t(top[lane]), low[i + lane] = int8_t(q[lane] - 128 * top[lane]);
        high_sum += high[i + lane], low_sum += low[i + lane];
      }
    }
  }
};

template <Kind K>
constexpr int64_t tile_bytes(int64_t cols) {
  return K == Kind::fp32 ? cols * 64 : K == Kind::bf16 ? cols * 32 : 64 + cols * 16;
}

// 16 rows times the operand; `cols` is a multiple of 4.
template <Kind K>
inline Vec dot(const char* tile, const Operand& operand, int64_t cols) {
  const float* x = operand.x;
  Vec a = {}, b = {}, c = {}, d = {};
  if constexpr (K == Kind::fp32) {
    for (int64_t k = 0; k < cols; k += 4, tile += 256) {
      a += load<Vec>(tile) * x[k];
      b += load<Vec>(tile + 64) * x[k + 1];
      c += load<Vec>(tile + 128) * x[k + 2];
      d += load<Vec>(tile + 192) * x[k + 3];
    }
  } else if constexpr (K == Kind::bf16) {
    constexpr int32_t upper = int32_t(0xFFFF0000);
    for (int64_t k = 0; k < cols; k += 4, tile += 128) {
      const Ints first = load<Ints>(tile), second = load<Ints>(tile + 64);
      a += as_floats(first << 16) * x[k];
      b += as_floats(first & upper) * x[k + 1];
      c += as_floats(second << 16) * x[k + 2];
      d += as_floats(second & upper) * x[k + 3];
    }
  } else {
    const Vec row_scale = load<Vec>(tile);
    tile += 64;
#if defined(__AVX512VNNI__)
    __m512i high = {}, low = {};
    for (int64_t k = 0; k < cols; k += 4, tile += 64) {
      const __m512i w = load<__m512i>(tile);
      high = _mm512_dpbusd_epi32(high, w, _mm512_set1_epi32(load<int32_t>(&operand.high[k])));
      low = _mm512_dpbusd_epi32(low, w, _mm512_set1_epi32(load<int32_t>(&operand.low[k])));
    }
    const Vec top = to_floats(load<Ints>(&high) - 128 * operand.high_sum);
    const Vec rest = to_floats(load<Ints>(&low) - 128 * operand.low_sum);
    return (top * 128.0f + rest) * (row_scale * operand.scale);
#else
    for (int64_t k = 0; k < cols; k += 4, tile += 64) {
      const Ints w = load<Ints>(tile);
      a += to_floats((w & 255) - 128) * x[k];
      b += to_floats(((w >> 8) & 255) - 128) * x[k + 1];
      c += to_floats(((w >> 16) & 255) - 128) * x[k + 2];
      d += to_floats(((w >> 24) & 255) - 128) * x[k + 3];
    }
    return ((a + b) + (c + d)) * row_scale;
#endif
  }
  return (a + b) + (c + d);
}

// One entry of a tile, for looking up a row of the table.
template <Kind K>
inline float entry(const char* tile, int64_t lane, int64_t k) {
  if (K == Kind::fp32) return load<float>(tile + (k * kLanes + lane) * 4);
  if (K == Kind::bf16) {
    const uint32_t bits = uint32_t(load<uint16_t>(tile + (k / 2 * kLanes + lane) * 4 + k % 2 * 2)) << 16;
    return load<float>(&bits);
  }
  const int32_t stored = load<uint8_t>(tile + 64 + (k / 4 * kLanes + lane) * 4 + k % 4);
  return load<float>(tile + lane * 4) * float(stored - 128);
}

// Write one entry of a tile, rounded to nearest even.
template <Kind K>
inline void put_entry(char* tile, int64_t lane, int64_t k, float value) {
  if constexpr (K == Kind::fp32) {
    std::memcpy(tile + (k * kLanes + lane) * 4, &value, sizeof value);
  } else {
    static_assert(K == Kind::bf16);
    const uint32_t bits = load<uint32_t>(&value);
    const uint16_t rounded = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    std::memcpy(tile + (k / 2 * kLanes + lane) * 4 + k % 2 * 2, &rounded, sizeof rounded);
  }
}

// The weights, in the order in which they are used.
class Stream {
 public:
  explicit Stream(const char* at) : at_(at) {}

  const float* floats(int64_t n) {
    const char* here = at_;
    at_ += round_up(n, kLanes) * sizeof(float);
    return reinterpret_cast<const float*>(here);
  }

  // write(tile number, the 16 results of each of `Together` matrices whose tiles take turns); this thread's share.
  template <Kind K, int Together = 1, class Write>
  void multiply(int64_t rows, int64_t cols, const float* x, Write write) {
    cols = round_up(cols, 4);
    const int64_t tiles = round_up(rows, kLanes) / kLanes, bytes = tile_bytes<K>(cols);
    const Operand operand = Operand::of<K>(x, cols);
    const int64_t end = tiles * (thread() + 1) / num_threads();
    for (int64_t t = tiles * thread() / num_threads(); t < end; ++t) {
      const char* tile = at_ + t * Together * bytes;
      if constexpr (Together == 1)
        write(t, dot<K>(tile, operand, cols));
      else
        write(t, dot<K>(tile, operand, cols), dot<K>(tile + bytes, operand, cols));
    }
    at_ += tiles * Together * bytes;
  }

 private:
  const char* at_;
};

}  // namespace

extern "C" {

// The sizes of a model; those of a mixer that does not occur are 0, ffn_dim is 0 without feed-forward network.
struct Shape {
  int64_t d_model, vocab_size, num_layers, ffn_dim;
  int64_t num_heads, num_kv_heads, head_dim, max_len, interleaved;
  int64_t d_inner, d_state, d_conv, dt_rank, gate;
  double eps;
};
}

namespace {

// Vectors between the stages, shared by all threads.
struct Buffers {
  std::vector<float> x, wide, mixed, z, small;
  explicit Buffers(const Shape& s)
      : x(round_up(s.d_model, kLanes)),
        wide(round_up(std::max({(s.num_heads + 2 * s.num_kv_heads) * s.head_dim, s.ffn_dim, s.d_inner}), kLanes)),
        mixed(round_up(std::max(s.num_heads * s.head_dim, s.d_inner), kLanes)),
        z(round_up(s.d_inner, kLanes)),
        small(round_up(s.dt_rank + 2 * s.d_state, kLanes)) {}
};

// One thread's view of one step.
template <Kind K>
class Step {
  // Keys and values beside weights of 8 or 16 bits are kept in 16 bits: at length 256 they are a tenth of the bytes.
  static constexpr Kind kCache = K == Kind::fp32 ? Kind::fp32 : Kind::bf16;
  using Cached = std::conditional_t<K == Kind::fp32, float, uint16_t>;

 public:
  Step(const Shape& shape, const char* stream, const char* table, const float* rope, char* state, int64_t position,
       Buffers& buffers)
      : s(shape), weights(stream), table(table), cos(rope + position * s.head_dim / 2),
        sin(cos + s.max_len * s.head_dim / 2), state(state), position(position), shared(buffers),
        normed(buffers.x.size()), query(round_up(s.head_dim, 4)), scores(round_up(s.max_len, kLanes)) {}

  void run(int64_t token, const int8_t* mixers, float* logits) {
    const int64_t cols = round_up(s.d_model, 4);
    const char* tile = table + token / kLanes * tile_bytes<K>(cols);
    std::vector<float> embedded(normed.size());
    for (int64_t k = 0; k < s.d_model; ++k) embedded[k] = entry<K>(tile, token % kLanes, k);
    normalise(embedded.data(), nullptr);
    weights.multiply<K>(s.d_model, s.d_model, normed.data(), [&](int64_t t, Vec v) { put(shared.x, t, v); });
    meet();
    for (int64_t layer = 0; layer < s.num_layers; ++layer) {
      normalise(shared.x.data(), weights.floats(s.d_model));
      if (mixers[layer])
        s6();
      else
        attention();
      if (s.ffn_dim) feed_forward();
    }
    normalise(shared.x.data(), weights.floats(s.d_model));
    weights.multiply<K>(s.vocab_size, s.d_model, normed.data(),
                        [&](int64_t t, Vec v) { store(logits + t * kLanes, v); });
  }

 private:
  // Let every thread finish what the next stage reads.
  static void meet() {
#pragma omp barrier
  }

  static void put(std::vector<float>& to, int64_t t, Vec v) { store(to.data() + t * kLanes, v); }

  // Every thread does this for itself: it is shorter than a meeting.
  void normalise(const float* x, const float* gain) {
    Vec squares = {};
    const int64_t size = normed.size();
    for (int64_t i = 0; i < size; i += kLanes) squares += load<Vec>(x + i) * load<Vec>(x + i);
    const float factor = 1.0f / std::sqrt(sum(squares) / float(s.d_model) + float(s.eps));
    for (int64_t i = 0; i < size; i += kLanes)
      store(&normed[i], load<Vec>(x + i) * factor * (gain ? load<Vec>(gain + i) : Vec{} + 1.0f));
  }

  void add_to_residual(int64_t cols, const std::vector<float>& from) {
    weights.multiply<K>(s.d_model, cols, from.data(), [&](int64_t t, Vec v) {
      put(shared.x, t, v + load<Vec>(&shared.x[t * kLanes]));
    });
    meet();
  }

  void feed_forward() {
    normalise(shared.x.data(), weights.floats(s.d_model));
    weights.multiply<K, 2>(s.ffn_dim, s.d_model, normed.data(),
                           [&](int64_t t, Vec gate, Vec up) { put(shared.wide, t, silu(gate) * up); });
    meet();
    add_to_residual(s.ffn_dim, shared.wide);
  }

  void attention() {
    const int64_t rows = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim;
    weights.multiply<K>(rows, s.d_model, normed.data(), [&](int64_t t, Vec v) { put(shared.wide, t, v); });
    meet();
    const int64_t group = s.num_heads / s.num_kv_heads, length = scores.size();
    const int64_t key_size = length * round_up(s.head_dim, 4) * sizeof(Cached);
    const int64_t value_size = length * round_up(s.head_dim, kLanes) * sizeof(Cached);
    const float* keys = shared.wide.data() + s.num_heads * s.head_dim;
    const float* values = keys + s.num_kv_heads * s.head_dim;
    for (int64_t g = thread(); g < s.num_kv_heads; g += num_threads()) {
      char *past_keys = state + g * key_size, *past_values = state + s.num_kv_heads * key_size + g * value_size;
      remember(keys + g * s.head_dim, values + g * s.head_dim, past_keys, past_values);
      for (int64_t h = g * group; h < (g + 1) * group; ++h) attend(h, past_keys, past_values);
    }
    state += s.num_kv_heads * (key_size + value_size);
    meet();
    add_to_residual(s.num_heads * s.head_dim, shared.mixed);
  }

  // Rotate `from` (head_dim) into `query`, times `factor`.
  void rotate(const float* from, float factor) {
    const int64_t half = s.head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t a = s.interleaved ? 2 * i : i, b = s.interleaved ? 2 * i + 1 : i + half;
      query[a] = (from[a] * cos[i] - from[b] * sin[i]) * factor;
      query[b] = (from[b] * cos[i] + from[a] * sin[i]) * factor;
    }
  }

  // Keys: tiles of 16 positions by head_dim. Values: tiles of 16 coordinates by positions.
  void remember(const float* key, const float* value, char* keys, char* values) {
    rotate(key, 1.0f);
    const int64_t cols = query.size(), length = scores.size();
    for (int64_t k = 0; k < s.head_dim; ++k) {
      put_entry<kCache>(tile_of(keys, position, cols), position % kLanes, k, query[k]);
      put_entry<kCache>(tile_of(values, k, length), k % kLanes, position, value[k]);
    }
  }

  template <class Char>
  static Char* tile_of(Char* matrix, int64_t row, int64_t cols) {
    return matrix + row / kLanes * tile_bytes<kCache>(cols);
  }

  void attend(int64_t head, const char* keys, const char* values) {
    rotate(shared.wide.data() + head * s.head_dim, 1.0f / std::sqrt(float(s.head_dim)));
    const int64_t cols = query.size(), count = position + 1, padded = round_up(count, kLanes);
    Vec most = Vec{} - std::numeric_limits<float>::infinity();
    for (int64_t p = 0; p < padded; p += kLanes) {
      store(&scores[p], dot<kCache>(tile_of(keys, p, cols), Operand(query.data()), cols));
      if (p + kLanes > count)
        std::fill(&scores[count], scores.data() + padded, -std::numeric_limits<float>::infinity());
      const Vec v = load<Vec>(&scores[p]);
      most = v > most ? v : most;
    }
    const float largest = *std::max_element(&most[0], &most[0] + kLanes);
    Vec total = {};
    for (int64_t p = 0; p < padded; p += kLanes) {
      const Vec v = exp_(load<Vec>(&scores[p]) - largest);
      store(&scores[p], v);
      total += v;
    }
    std::fill(&scores[count], scores.data() + padded, 0.0f);
    const float share = 1.0f / sum(total);
    for (int64_t k = 0; k < s.head_dim; k += kLanes) {
      const char* tile = tile_of(values, k, int64_t(scores.size()));
      const Vec v = dot<kCache>(tile, Operand(scores.data()), round_up(count, 4)) * share;
      std::memcpy(&shared.mixed[head * s.head_dim + k], &v, std::min(kLanes, s.head_dim - k) * sizeof(float));
    }
  }

  // h = exp(dt A) h + dt u B,  y = C h + D u, gated; dt, B, C chosen by u, the convolved input.
  void s6() {
    const int64_t size = round_up(s.d_inner, kLanes), taps = s.d_conv - 1;
    float *window = reinterpret_cast<float*>(state), *scan = window + taps * size;
    state = reinterpret_cast<char*>(scan + s.d_state * size);
    const float *kernel = weights.floats(s.d_conv * size), *bias = weights.floats(size);
    weights.multiply<K>(s.d_inner, s.d_model, normed.data(), [&](int64_t t, Vec v) {
      Vec u = load<Vec>(bias + t * kLanes) + v * load<Vec>(kernel + taps * size + t * kLanes);
      for (int64_t i = 0; i < taps; ++i) {
        float* past = window + i * size + t * kLanes;
        u += load<Vec>(past) * load<Vec>(kernel + i * size + t * kLanes);
        store(past, i + 1 < taps ? load<Vec>(past + size) : v);
      }
      put(shared.wide, t, silu(u));
    });
    if (s.gate)
      weights.multiply<K>(s.d_inner, s.d_model, normed.data(), [&](int64_t t, Vec v) { put(shared.z, t, silu(v)); });
    meet();
    weights.multiply<K>(s.dt_rank + 2 * s.d_state, s.d_inner, shared.wide.data(),
                        [&](int64_t t, Vec v) { put(shared.small, t, v); });
    meet();
    const float *dt_bias = weights.floats(size), *rate = weights.floats(s.d_state * size);
    const float *skip = weights.floats(size), *B = shared.small.data() + s.dt_rank, *C = B + s.d_state;
    weights.multiply<Kind::fp32>(s.d_inner, s.dt_rank, shared.small.data(), [&](int64_t t, Vec v) {
      const int64_t at = t * kLanes;
      const Vec u = load<Vec>(&shared.wide[at]);
      Vec dt = v + load<Vec>(dt_bias + at), y = load<Vec>(skip + at) * u;
      for (int64_t i = 0; i < kLanes; ++i) dt[i] = dt[i] > 20.0f ? dt[i] : std::log1p(std::exp(dt[i]));
      for (int64_t i = 0; i < s.d_state; ++i) {
        float* h = scan + i * size + at;
        const Vec next = exp2_(dt * load<Vec>(rate + i * size + at)) * load<Vec>(h) + dt * u * B[i];
        store(h, next);
        y += next * C[i];
      }
      put(shared.mixed, t, s.gate ? y * load<Vec>(&shared.z[at]) : y);
    });
    meet();
    add_to_residual(s.d_inner, shared.mixed);
  }

  const Shape& s;
  Stream weights;
  const char* table;
  const float *cos, *sin;
  char* state;
  const int64_t position;
  Buffers& shared;
  std::vector<float> normed, query, scores;
};

template <Kind K>
void step(const Shape& shape, const char* stream, const char* table, const int8_t* mixers, const float* rope,
          char* state, float* logits, int64_t token, int64_t position, int threads) {
  Buffers buffers(shape);
#pragma omp parallel num_threads(threads)
  Step<K>(shape, stream, table, rope, state, position, buffers).run(token, mixers, logits);
}

}  // namespace

extern "C" {

// kind: 0 fp32, 1 bf16, 2 int8. table: the head's tiles in `stream`. mixers: one a layer, 0 attention, 1 S6.
// rope: cosines, then sines (max_len, head_dim / 2). logits: vocab_size rounded up to 16.
void native_step(const Shape* shape, int kind, const char* stream, const char* table, const int8_t* mixers,
                 const float* rope, char* state, float* logits, int64_t token, int64_t position, int threads) {
  const auto call = kind == 0 ? step<Kind::fp32> : kind == 1 ? step<Kind::bf16> : step<Kind::int8>;
  call(*shape, stream, table, mixers, rope, state, logits, token, position, threads);
}

// Ask for large pages in a buffer that was not written to yet; systems without them ignore it.
void prefer_huge_pages(char* buffer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer) + uintptr_t(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes;
#endif
}
}
