// Selective scan (Gu and Dao, arXiv 2312.00752, algorithm 2), forward and backward, with what is elementwise
// around it: the softplus of the step size in front and the SiLU gate behind.
//
//   s[t] = softplus(dt[t] + dt_bias) where there is a dt_bias, dt[t] otherwise
//   h[t] = exp(s[t] A) h[t-1] + s[t] x[t] B[t],  h[t-1] = 0 where starts[t]
//   y[t] = (C[t] . h[t] + D x[t]) silu(z[t]),    without the last factor where there is no z
//
// One vector holds neighbouring channels, the states of a channel lie in separate vectors: inputs and outputs
// are then read and written without shuffles, and only the gradients of B and C, which are sums over channels,
// need a sum across a vector. They are collected over a group of channels first, so that such sums are rare.
// Loops run over a tile of states at a time, whose states, rates and gradients then stay in registers.
//
// The forward pass keeps the states at chunk borders alone. The backward pass walks the chunks from the last to
// the first and rebuilds what it needs of one chunk in buffers that stay in the cache.
//
// Sequences are fp32 or bf16, everything else and all arithmetic is fp32. Shapes: x, dt, z (batch, length,
// channels); B, C (batch, length, n); starts (batch, length); decay_rate (n, channels) = A log2(e), so that
// exp(s A) = 2^(s decay_rate); D, dt_bias (channels); state, last (batch, n, channels); borders (batch, chunks,
// n, channels). `channels` is a multiple of 16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

// What both passes read. Steps are the distances between two positions, in elements; rows follow one another.
struct Problem {
  const void *x, *dt, *B, *C, *z;  // z may be null
  int64_t x_step, dt_step, B_step, C_step, z_step;
  const float *decay_rate, *D, *dt_bias;  // dt_bias may be null
  const uint8_t* starts;                  // may be null
  int64_t batch, length, channels, n;
};

struct Gradients {
  void *x, *dt, *z;                        // as the inputs, contiguous; z may be null
  float *A, *B, *C, *D, *dt_bias, *state;  // A (batch, n, channels); B, C (groups, batch, length, n);
};                                         // D, dt_bias (batch, channels)

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kChunk = 16;   // positions between two kept states
constexpr int64_t kGroup = 128;  // channels one thread works on at a time
constexpr int64_t kTile = 4;     // states in registers; n is rounded up to a multiple with states that stay zero
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

// 2^z with a relative error below 2e-7, exactly 1 at 0; results below the smallest normal number may be zero,
// NaN stays NaN. The distance to the next integer goes through a minimax polynomial of relative error 2e-9.
inline Vec exp2_(Vec z) {
#if defined(__AVX512DQ__)
  const Vec r = (Vec)_mm512_reduce_ps((__m512)z, 8);  // z - nearest integer
#else
  z = z < -126.0f ? Vec{} - 127.0f : z;
  z = z > 127.0f ? Vec{} + 127.0f : z;
  const Vec shifted = z + 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer in the low bits
  const Vec r = z - (shifted - 12582912.0f);
#endif
  Vec p = r * 1.53533620e-4f + 1.33988747e-3f;
  p = p * r + 9.61843736e-3f;
  p = p * r + 5.55033247e-2f;
  p = p * r + 2.40226479e-1f;
  p = p * r + 6.93147203e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(z - r));
#else
  return p * bits_of<Vec>((bits_of<Words>(shifted) << 23) + 0x3f800000u);  // the exponent of -127 is that of 0
#endif
}

inline Vec sigmoid(Vec v) { return 1.0f / (1.0f + exp2_(v * -kLog2e)); }

// log(1 + exp(v)) and its derivative, both to a few units in the last place and exactly 0 at -infinity.
// log(1 + e) = 2 atanh(q) with q = e / (2 + e) <= 1/3 loses nothing where e is small.
inline Vec softplus(Vec v, Vec* slope) {
  Vec below = v < 0.0f ? v : -v;
  below = below < -120.0f ? Vec{} - 120.0f : below;
  const Vec e = exp2_(below * kLog2e), q = e / (2.0f + e), s = q * q;
  Vec p = s * (1.0f / 17) + 1.0f / 15;
  p = p * s + 1.0f / 13;
  p = p * s + 1.0f / 11;
  p = p * s + 1.0f / 9;
  p = p * s + 1.0f / 7;
  p = p * s + 1.0f / 5;
  p = p * s + 1.0f / 3;
  p = p * s + 1.0f;
  *slope = (v < 0.0f ? e : Vec{} + 1.0f) / (1.0f + e);
  return (v < 0.0f ? Vec{} : v) + 2.0f * q * p;
}

// Decays far below 1e-30 times small gradients are subnormal numbers, which some processors compute a hundred
// times slower. Results that small are rounded to zero here.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

int64_t count(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Positions of one chunk: `at` counts positions over all rows.
struct Span {
  int64_t at, size;
};

// One thread's work, a group of channels of one row, and its buffers. The layout (tile, position, state of the
// tile) keeps what one pass over a tile reads together.
template <class T>
struct Worker {
  const Problem& p;
  const int64_t row, first, blocks, tiles, states, chunks;
  const FlushSubnormals guard;
  std::vector<Vec> rates, carried;  // (block, state)
  std::vector<float> B, C;          // (tile, position, state)
  // Of one block of channels and one chunk: inputs, step sizes, their slopes, s x, outputs before the gate.
  Vec x[kChunk], s[kChunk], slope[kChunk], drive[kChunk], y[kChunk];
  bool start[kChunk];

  Worker(const Problem& p, int64_t row, int64_t group, const float* state)
      : p(p), row(row), first(group * kGroup), blocks(std::min(kGroup, p.channels - first) / kLanes),
        tiles(count(p.n, kTile)), states(tiles * kTile), chunks(count(p.length, kChunk)), rates(blocks * states),
        carried(blocks * states), B(kChunk * states), C(kChunk * states) {
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < p.n; ++i) {
        carried[block * states + i] = load(state + (row * p.n + i) * p.channels + channel(block));
        rates[block * states + i] = load(p.decay_rate + i * p.channels + channel(block));
      }
  }

  int64_t channel(int64_t block) const { return first + block * kLanes; }

  float* border(float* borders, int64_t chunk, int64_t block) const {
    return borders + (row * chunks + chunk) * p.n * p.channels + channel(block);
  }

  // Reads what all channels share.
  Span open_chunk(int64_t chunk) {
    const Span span{row * p.length + chunk * kChunk, std::min(kChunk, p.length - chunk * kChunk)};
    for (int64_t k = 0; k < span.size; ++k) {
      const T* B_t = static_cast<const T*>(p.B) + (span.at + k) * p.B_step;
      const T* C_t = static_cast<const T*>(p.C) + (span.at + k) * p.C_step;
      for (int64_t i = 0; i < p.n; ++i) {
        const int64_t to = ((i / kTile) * kChunk + k) * kTile + i % kTile;
        B[to] = scalar(B_t[i]);
        C[to] = scalar(C_t[i]);
      }
      start[k] = p.starts && p.starts[span.at + k];
    }
    return span;
  }

  void open_block(Span span, int64_t channel) {
    const Vec skip = load(p.D + channel), bias = p.dt_bias ? load(p.dt_bias + channel) : Vec{};
    for (int64_t k = 0; k < span.size; ++k) {
      x[k] = load(static_cast<const T*>(p.x) + (span.at + k) * p.x_step + channel);
      s[k] = load(static_cast<const T*>(p.dt) + (span.at + k) * p.dt_step + channel);
      slope[k] = Vec{} + 1.0f;
      if (p.dt_bias) s[k] = softplus(s[k] + bias, &slope[k]);
      drive[k] = s[k] * x[k];
      y[k] = skip * x[k];
    }
  }

  Vec gate(Span span, int64_t k, int64_t channel) const {
    return load(static_cast<const T*>(p.z) + (span.at + k) * p.z_step + channel);
  }

  void write(float* to, const Vec* from) const {  // (batch, n, channels)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < p.n; ++i)
        store(to + (row * p.n + i) * p.channels + channel(block), from[block * states + i]);
  }
};

template <class T>
struct Forward : Worker<T> {
  using Worker<T>::Worker;

  void run(T* out, float* borders, float* last) {
    const auto& p = this->p;
    for (int64_t chunk = 0; chunk < this->chunks; ++chunk) {
      const Span span = this->open_chunk(chunk);
      for (int64_t block = 0; block < this->blocks; ++block) {
        const int64_t channel = this->channel(block);
        Vec* h = &this->carried[block * this->states];
        if (borders)
          for (int64_t i = 0; i < p.n; ++i) store(this->border(borders, chunk, block) + i * p.channels, h[i]);
        this->open_block(span, channel);
        for (int64_t tile = 0; tile < this->tiles; ++tile) scan_tile(span.size, block, tile);
        for (int64_t k = 0; k < span.size; ++k) {
          const Vec z = p.z ? this->gate(span, k, channel) : Vec{};
          store(out + (span.at + k) * p.channels + channel, p.z ? this->y[k] * z * sigmoid(z) : this->y[k]);
        }
      }
    }
    this->write(last, this->carried.data());
  }

  void scan_tile(int64_t size, int64_t block, int64_t tile) {
    Vec h[kTile], rate[kTile];
    Vec* kept = &this->carried[block * this->states + tile * kTile];
    for (int i = 0; i < kTile; ++i) h[i] = kept[i];
    for (int i = 0; i < kTile; ++i) rate[i] = this->rates[block * this->states + tile * kTile + i];
    const float *B = &this->B[tile * kChunk * kTile], *C = &this->C[tile * kChunk * kTile];
    for (int64_t k = 0; k < size; ++k, B += kTile, C += kTile) {
      const Vec s = this->s[k], drive = this->drive[k];
      if (this->start[k])
        for (int i = 0; i < kTile; ++i) h[i] = Vec{};
      Vec out = this->y[k];
      for (int i = 0; i < kTile; ++i) {
        h[i] = exp2_(s * rate[i]) * h[i] + drive * B[i];
        out += h[i] * C[i];
      }
      this->y[k] = out;
    }
    for (int i = 0; i < kTile; ++i) kept[i] = h[i];
  }
};

// With g[t] = dL/dh[t] = C[t] dy[t] + decay[t+1] g[t+1]:  dB += g s x,  dC += h dy,  dA += g decay h[t-1] s.
template <class T>
struct Backward : Worker<T> {
  std::vector<Vec> dA, dB, dC, dD, dbias;                     // dA as rates; dB, dC as B, C; one vector a block
  Vec decay[kChunk * kTile], remembered[kChunk * kTile];      // of one tile: decay and decay h[t-1]
  Vec dy[kChunk], through_drive[kChunk], through_decay[kChunk];

  Backward(const Problem& p, int64_t row, int64_t group, const float* dlast)
      : Worker<T>(p, row, group, dlast), dA(this->rates.size()), dB(this->B.size()), dC(this->C.size()),
        dD(this->blocks), dbias(this->blocks) {}

  void run(int64_t group, float* borders, const T* dout, const Gradients& out) {
    const auto& p = this->p;
    for (int64_t chunk = this->chunks - 1; chunk >= 0; --chunk) {
      const Span span = this->open_chunk(chunk);
      std::fill(dB.begin(), dB.end(), Vec{});
      std::fill(dC.begin(), dC.end(), Vec{});
      for (int64_t block = 0; block < this->blocks; ++block) {
        this->open_block(span, this->channel(block));
        open_gradients(span, this->channel(block), dout);
        for (int64_t tile = 0; tile < this->tiles; ++tile) {
          rebuild_tile(span.size, block, tile, this->border(borders, chunk, block));
          reverse_tile(span.size, block, tile);
        }
        close_gradients(span, block, dout, out);
      }
      for (int64_t k = 0; k < span.size; ++k)
        for (int64_t i = 0; i < p.n; ++i) {
          const int64_t from = ((i / kTile) * kChunk + k) * kTile + i % kTile;
          const int64_t to = (group * p.batch * p.length + span.at + k) * p.n + i;
          out.B[to] = sum(dB[from]);
          out.C[to] = sum(dC[from]);
        }
    }
    this->write(out.A, dA.data());
    this->write(out.state, this->carried.data());
    for (int64_t block = 0; block < this->blocks; ++block) {
      store(out.D + this->row * p.channels + this->channel(block), dD[block]);
      if (p.dt_bias) store(out.dt_bias + this->row * p.channels + this->channel(block), dbias[block]);
    }
  }

  void open_gradients(Span span, int64_t channel, const T* dout) {
    for (int64_t k = 0; k < span.size; ++k) {
      dy[k] = load(dout + (span.at + k) * this->p.channels + channel);
      if (this->p.z) {
        const Vec z = this->gate(span, k, channel);
        dy[k] *= z * sigmoid(z);
      }
      through_drive[k] = through_decay[k] = Vec{};
    }
  }

  void rebuild_tile(int64_t size, int64_t block, int64_t tile, const float* border) {
    Vec h[kTile], rate[kTile];
    for (int i = 0; i < kTile; ++i)
      h[i] = tile * kTile + i < this->p.n ? load(border + (tile * kTile + i) * this->p.channels) : Vec{};
    for (int i = 0; i < kTile; ++i) rate[i] = this->rates[block * this->states + tile * kTile + i];
    const int64_t base = tile * kChunk * kTile;
    for (int64_t k = 0; k < size; ++k) {
      const float *B = &this->B[base + k * kTile], *C = &this->C[base + k * kTile];
      const Vec s = this->s[k], drive = this->drive[k], dy_t = dy[k];
      const bool start = this->start[k];
      Vec *to_decay = &decay[k * kTile], *to_remembered = &remembered[k * kTile], *dC_t = &dC[base + k * kTile];
      if (start)
        for (int i = 0; i < kTile; ++i) h[i] = Vec{};
      Vec out = this->y[k];
      for (int i = 0; i < kTile; ++i) {
        const Vec factor = exp2_(s * rate[i]), before = factor * h[i];
        to_decay[i] = factor;
        to_remembered[i] = before;
        h[i] = before + drive * B[i];
        dC_t[i] += h[i] * dy_t;
        out += h[i] * C[i];
      }
      if (start)
        for (int i = 0; i < kTile; ++i) to_decay[i] = Vec{};  // what lies before gets no gradient
      this->y[k] = out;
    }
  }

  void reverse_tile(int64_t size, int64_t block, int64_t tile) {
    const int64_t base = tile * kChunk * kTile, offset = block * this->states + tile * kTile;
    Vec g[kTile], rate[kTile], dA_t[kTile];
    for (int i = 0; i < kTile; ++i) {
      g[i] = this->carried[offset + i];
      rate[i] = this->rates[offset + i];
      dA_t[i] = dA[offset + i];
    }
    for (int64_t k = size - 1; k >= 0; --k) {
      const float *B = &this->B[base + k * kTile], *C = &this->C[base + k * kTile];
      const Vec s = this->s[k], drive = this->drive[k], dy_t = dy[k];
      Vec *dB_t = &dB[base + k * kTile], drive_sum = through_drive[k], decay_sum = through_decay[k];
      for (int i = 0; i < kTile; ++i) {
        const Vec grad = g[i] + dy_t * C[i], change = grad * remembered[k * kTile + i];
        dB_t[i] += grad * drive;
        drive_sum += grad * B[i];
        dA_t[i] += change * s;
        decay_sum += change * rate[i];
        g[i] = grad * decay[k * kTile + i];
      }
      through_drive[k] = drive_sum;
      through_decay[k] = decay_sum;
    }
    for (int i = 0; i < kTile; ++i) {
      this->carried[offset + i] = g[i];
      dA[offset + i] = dA_t[i];
    }
  }

  void close_gradients(Span span, int64_t block, const T* dout, const Gradients& out) {
    const auto& p = this->p;
    const int64_t channel = this->channel(block);
    const Vec skip = load(p.D + channel);
    for (int64_t k = 0; k < span.size; ++k) {
      const int64_t to = (span.at + k) * p.channels + channel;
      const Vec x = this->x[k], s = this->s[k];
      const Vec ds = (x * through_drive[k] + through_decay[k] * kLn2) * this->slope[k];
      store(static_cast<T*>(out.x) + to, skip * dy[k] + s * through_drive[k]);
      store(static_cast<T*>(out.dt) + to, ds);
      dD[block] += dy[k] * x;
      dbias[block] += ds;
      if (p.z) {
        const Vec z = this->gate(span, k, channel), gate = sigmoid(z);
        store(static_cast<T*>(out.z) + to, load(dout + to) * this->y[k] * gate * (1.0f + z * (1.0f - gate)));
      }
    }
  }
};

// Parts share nothing, so that the number of threads changes no bit.
template <class Work>
void for_all_parts(const Problem& p, int threads, Work work) {
  const int64_t groups = count(p.channels, kGroup);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < p.batch * groups; ++part) work(part / groups, part % groups);
}

template <class T>
void forward(const Problem& p, const float* state, void* y, float* borders, float* last, int threads) {
  for_all_parts(p, threads, [&](int64_t row, int64_t group) {
    Forward<T>(p, row, group, state).run(static_cast<T*>(y), borders, last);
  });
}

template <class T>
void backward(const Problem& p, float* borders, const void* dy, const float* dlast, const Gradients& out,
              int threads) {
  for_all_parts(p, threads, [&](int64_t row, int64_t group) {
    Backward<T>(p, row, group, dlast).run(group, borders, static_cast<const T*>(dy), out);
  });
}

}  // namespace

extern "C" {

int64_t scan_chunk() { return kChunk; }
int64_t scan_group() { return kGroup; }

void scan_forward(const Problem* p, const float* state, void* y, float* borders, float* last, int half,
                  int threads) {
  (half ? forward<bf16> : forward<float>)(*p, state, y, borders, last, threads);
}

void scan_backward(const Problem* p, float* borders, const void* dy, const float* dlast, const Gradients* out,
                   int half, int threads) {
  (half ? backward<bf16> : backward<float>)(*p, borders, dy, dlast, *out, threads);
}
}
