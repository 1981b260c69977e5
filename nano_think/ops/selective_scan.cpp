// Selective scan (Gu and Dao, arXiv 2312.00752, algorithm 2) in fp32, forward and backward.
//
//   h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t],   y[t] = C[t] . h[t] + D x[t],   h[t-1] = 0 where starts[t].
//
// One vector holds neighbouring channels, the states of a channel lie in separate vectors: inputs and outputs
// are then read and written without shuffles, and only the gradients of B and C, which are sums over channels,
// need a sum across a vector. They are collected over a group of channels first, so that such sums are rare.
//
// The forward pass keeps the states at chunk borders alone. The backward pass walks the chunks from the last to
// the first and rebuilds the states and decays of one chunk in a buffer that stays in the cache.
//
// x, dt, y (batch, length, channels); B, C (batch, length, n); starts (batch, length) or null;
// decay_rate (n, channels) = A log2(e), so that exp(dt A) = 2^(dt decay_rate); state, last (batch, n, channels);
// borders (batch, chunks, n, channels) or null. `channels` is a multiple of 16. Everything is contiguous.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

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
constexpr int kBlocks = kGroup / kLanes;
constexpr float kLn2 = 0.693147180559945f;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline float sum(Vec v) {
  float parts[kLanes];
  std::memcpy(parts, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// 2^z with a relative error below 2e-7, exactly 1 at 0; results below the smallest normal number become that
// number, NaN stays NaN. Adding 1.5 * 2^23 rounds z to an integer, which is left in the low bits of the sum; the
// fraction goes through a minimax polynomial of relative error 2e-9.
inline Vec exp2_(Vec z) {
  z = z < -126.0f ? Vec{} - 126.0f : z;
  z = z > 127.0f ? Vec{} + 127.0f : z;
  const Vec shifted = z + 12582912.0f;
  const Vec r = z - (shifted - 12582912.0f);
  Vec p = r * 1.53533620e-4f + 1.33988747e-3f;
  p = p * r + 9.61843736e-3f;
  p = p * r + 5.55033247e-2f;
  p = p * r + 2.40226479e-1f;
  p = p * r + 6.93147203e-1f;
  p = p * r + 1.0f;
  Ints exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + 0x3f800000;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
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

struct Shape {
  int64_t batch, length, channels, n;
  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
  int64_t groups() const { return (channels + kGroup - 1) / kGroup; }
};

struct Inputs {
  const float *x, *dt, *decay_rate, *B, *C, *D;
  const uint8_t* starts;
};

// What one thread works on: a group of channels of one row.
struct Part {
  int64_t row, first, blocks;
  Part(const Shape& s, int64_t row, int64_t group)
      : row(row), first(group * kGroup), blocks((std::min(kGroup, s.channels - first)) / kLanes) {}
};

// N is the number of states where the compiler knows it, 0 otherwise.
template <int N>
void forward_part(const Shape& s, const Inputs& in, Part part, const float* state, float* y, float* borders,
                  float* last) {
  const FlushSubnormals guard;
  const int64_t n = N ? N : s.n, size = s.channels, row = part.row;
  std::vector<Vec> carried(part.blocks * n), rates(part.blocks * n), buffer(n);
  for (int64_t block = 0; block < part.blocks; ++block)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t channel = part.first + block * kLanes;
      carried[block * n + i] = load(state + (row * n + i) * size + channel);
      rates[block * n + i] = load(in.decay_rate + i * size + channel);
    }
  for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, s.length);
    for (int64_t block = 0; block < part.blocks; ++block) {
      const int64_t channel = part.first + block * kLanes;
      const Vec* rate = &rates[block * n];
      const Vec skip = load(in.D + channel);
      Vec fixed[N ? N : 1];
      Vec* h = N ? fixed : buffer.data();
      for (int64_t i = 0; i < n; ++i) h[i] = carried[block * n + i];
      if (borders)
        for (int64_t i = 0; i < n; ++i)
          store(borders + ((row * s.chunks() + chunk) * n + i) * size + channel, h[i]);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = row * s.length + t;
        const float *B = in.B + at * n, *C = in.C + at * n;
        const Vec x = load(in.x + at * size + channel), dt = load(in.dt + at * size + channel);
        const Vec drive = dt * x;
        if (in.starts && in.starts[at])
          for (int64_t i = 0; i < n; ++i) h[i] = Vec{};
        Vec out = skip * x;
        for (int64_t i = 0; i < n; ++i) {
          h[i] = exp2_(dt * rate[i]) * h[i] + drive * B[i];
          out += h[i] * C[i];
        }
        store(y + at * size + channel, out);
      }
      for (int64_t i = 0; i < n; ++i) carried[block * n + i] = h[i];
    }
  }
  for (int64_t block = 0; block < part.blocks; ++block)
    for (int64_t i = 0; i < n; ++i)
      store(last + (row * n + i) * size + part.first + block * kLanes, carried[block * n + i]);
}

struct Gradients {
  float *x, *dt, *A, *B, *C, *D, *state;  // A (batch, n, channels), D (batch, channels), B, C (groups, batch, length, n)
};

// The working memory of one thread in the backward pass; all of it is vectors of kLanes channels.
struct Scratch {
  std::vector<Vec> states, decays, dB, dC, rates, carried, dA, dD, zeros;
  Scratch(int64_t n, int64_t blocks)
      : states((kChunk + 1) * n), decays(kChunk * n), dB(kChunk * n), dC(kChunk * n), rates(blocks * n),
        carried(blocks * n), dA(blocks * n), dD(blocks), zeros(n) {}
};

// states[k] is the state before position begin + k, states[k + 1] the one after it.
template <int N>
void rebuild_chunk(const Shape& s, const Inputs& in, int64_t row, int64_t channel, int64_t begin, int64_t end,
                   const float* border, const Vec* rate, Scratch& w) {
  const int64_t n = N ? N : s.n, size = s.channels;
  for (int64_t i = 0; i < n; ++i) w.states[i] = load(border + i * size + channel);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = row * s.length + t, k = t - begin;
    const float* B = in.B + at * n;
    const Vec dt = load(in.dt + at * size + channel), drive = dt * load(in.x + at * size + channel);
    const Vec* before = in.starts && in.starts[at] ? w.zeros.data() : &w.states[k * n];
    Vec *decay = &w.decays[k * n], *after = &w.states[(k + 1) * n];
    for (int64_t i = 0; i < n; ++i) {
      decay[i] = exp2_(dt * rate[i]);
      after[i] = decay[i] * before[i] + drive * B[i];
    }
  }
}

// With g[t] = dL/dh[t] = C[t] dy[t] + decay[t+1] g[t+1]:  dB += g dt x,  dC += h dy,  dA += g decay h[t-1] dt.
template <int N>
void reverse_chunk(const Shape& s, const Inputs& in, int64_t row, int64_t channel, int64_t block, int64_t begin,
                   int64_t end, const float* dy, const Gradients& out, Scratch& w) {
  const int64_t n = N ? N : s.n, size = s.channels;
  const Vec *rate = &w.rates[block * n], skip = load(in.D + channel);
  Vec *g = &w.carried[block * n], *dA = &w.dA[block * n], dD = w.dD[block];
  for (int64_t t = end - 1; t >= begin; --t) {
    const int64_t at = row * s.length + t, k = t - begin;
    const bool start = in.starts && in.starts[at];
    const float *B = in.B + at * n, *C = in.C + at * n;
    const Vec x = load(in.x + at * size + channel), dt = load(in.dt + at * size + channel);
    const Vec dy_t = load(dy + at * size + channel), drive = dt * x;
    const Vec *after = &w.states[(k + 1) * n], *decay = &w.decays[k * n];
    const Vec* before = start ? w.zeros.data() : &w.states[k * n];
    Vec *dB = &w.dB[k * n], *dC = &w.dC[k * n];
    Vec through_drive = {}, through_decay = {};
    for (int64_t i = 0; i < n; ++i) {
      const Vec grad = g[i] + dy_t * C[i];
      dC[i] += after[i] * dy_t;
      dB[i] += grad * drive;
      through_drive += grad * B[i];
      const Vec earlier = grad * decay[i], change = earlier * before[i];
      dA[i] += change * dt;
      through_decay += change * rate[i];
      g[i] = start ? Vec{} : earlier;
    }
    store(out.x + at * size + channel, skip * dy_t + dt * through_drive);
    store(out.dt + at * size + channel, x * through_drive + through_decay * kLn2);
    dD += dy_t * x;
  }
  w.dD[block] = dD;
}

template <int N>
void backward_part(const Shape& s, const Inputs& in, Part part, int64_t group, const float* borders,
                   const float* dy, const float* dlast, const Gradients& out) {
  const FlushSubnormals guard;
  const int64_t n = N ? N : s.n, size = s.channels, row = part.row;
  Scratch w(n, part.blocks);
  for (int64_t block = 0; block < part.blocks; ++block)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t channel = part.first + block * kLanes;
      w.carried[block * n + i] = load(dlast + (row * n + i) * size + channel);
      w.rates[block * n + i] = load(in.decay_rate + i * size + channel);
    }
  for (int64_t chunk = s.chunks() - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, s.length);
    std::fill(w.dB.begin(), w.dB.end(), Vec{});
    std::fill(w.dC.begin(), w.dC.end(), Vec{});
    const float* border = borders + (row * s.chunks() + chunk) * n * size;
    for (int64_t block = 0; block < part.blocks; ++block) {
      const int64_t channel = part.first + block * kLanes;
      rebuild_chunk<N>(s, in, row, channel, begin, end, border, &w.rates[block * n], w);
      reverse_chunk<N>(s, in, row, channel, block, begin, end, dy, out, w);
    }
    const int64_t at = ((group * s.batch + row) * s.length + begin) * n;
    for (int64_t i = 0; i < (end - begin) * n; ++i) {
      out.B[at + i] = sum(w.dB[i]);
      out.C[at + i] = sum(w.dC[i]);
    }
  }
  for (int64_t block = 0; block < part.blocks; ++block) {
    const int64_t channel = part.first + block * kLanes;
    store(out.D + row * size + channel, w.dD[block]);
    for (int64_t i = 0; i < n; ++i) {
      store(out.A + (row * n + i) * size + channel, w.dA[block * n + i]);
      store(out.state + (row * n + i) * size + channel, w.carried[block * n + i]);
    }
  }
}

}  // namespace

extern "C" {

int64_t scan_chunk() { return kChunk; }
int64_t scan_group() { return kGroup; }

void scan_forward(const float* x, const float* dt, const float* decay_rate, const float* B, const float* C,
                  const float* D, const uint8_t* starts, const float* state, float* y, float* borders,
                  float* last, int64_t batch, int64_t length, int64_t channels, int64_t n, int threads) {
  const Shape s{batch, length, channels, n};
  const Inputs in{x, dt, decay_rate, B, C, D, starts};
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t group = 0; group < s.groups(); ++group) {
      const Part part(s, row, group);
      if (n == 16)
        forward_part<16>(s, in, part, state, y, borders, last);
      else
        forward_part<0>(s, in, part, state, y, borders, last);
    }
}

void scan_backward(const float* x, const float* dt, const float* decay_rate, const float* B, const float* C,
                   const float* D, const uint8_t* starts, const float* borders, const float* dy,
                   const float* dlast, float* dx, float* ddt, float* dA, float* dB, float* dC, float* dD,
                   float* dstate, int64_t batch, int64_t length, int64_t channels, int64_t n, int threads) {
  const Shape s{batch, length, channels, n};
  const Inputs in{x, dt, decay_rate, B, C, D, starts};
  const Gradients out{dx, ddt, dA, dB, dC, dD, dstate};
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t group = 0; group < s.groups(); ++group) {
      const Part part(s, row, group);
      if (n == 16)
        backward_part<16>(s, in, part, group, borders, dy, dlast, out);
      else
        backward_part<0>(s, in, part, group, borders, dy, dlast, out);
    }
}
}
