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
// channels); B, C (batch, length, n); starts (batch, length); A (channels, n); D, dt_bias (channels); state, last
// (batch, channels, n); borders (batch, chunks, n, channels). `channels` is a multiple of 16.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

// What both passes read. Steps are the distances between two positions, in elements; rows follow one another.
struct Problem {
  const void *x, *dt, *B, *C, *z;  // z may be null
  int64_t x_step, dt_step, B_step, C_step, z_step;
  const float *A, *D, *dt_bias;    // dt_bias may be null
  const uint8_t* starts;           // may be null
  int64_t batch, length, channels, n;
};

struct Gradients {
  void *x, *dt, *z;                        // as the inputs, contiguous; z may be null
  float *A, *B, *C, *D, *dt_bias, *state;  // A (batch, channels, n); B, C (groups, batch, length, n);
};                                         // D, dt_bias (batch, channels)

namespace {

constexpr int64_t kChunk = 16;   // positions between two kept states
constexpr int64_t kGroup = 192;  // channels over which gradients of B and C are summed; threads share no group
constexpr int64_t kGroupBlocks = kGroup / kLanes;
constexpr int64_t kTile = 4;     // states in registers; n is rounded up to a multiple with states that stay zero

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

// One line of each row of an array, to be fetched while something else is computed. A block takes one line of many
// rows, which no processor foresees, and whose addresses fall on few sets of the first cache. A training step
// finds most of them in memory alone, outputs included.
struct Lines {
  const void* first;
  int64_t step;  // bytes

  void fetch(int64_t k) const { __builtin_prefetch(static_cast<const char*>(first) + k * step); }
};

// A block of channels of one chunk.
struct Place {
  int64_t chunk, block;
};

// One thread's work, neighbouring groups of channels of one row, and its buffers. The layout (tile, position, state
// of the tile) keeps what one pass over a tile reads together.
template <class T>
struct Worker {
  const Problem& p;
  const int64_t row, first, blocks, tiles, states, chunks;
  const FlushSubnormals guard;
  std::vector<Vec> rates, carried;  // (block, state); rates are A log2(e): exp(s A) = 2^(s rate)
  std::vector<float> B, C;          // (position, state)
  // Of one block of channels and one chunk: inputs, step sizes, their slopes, s x, gates, outputs before the gate.
  Vec x[kChunk], s[kChunk], slope[kChunk], drive[kChunk], z[kChunk], y[kChunk];
  bool start[kChunk];

  Worker(const Problem& p, int64_t row, int64_t group, int64_t groups, const float* state)
      : p(p), row(row), first(group * kGroup), blocks(std::min(groups * kGroup, p.channels - first) / kLanes),
        tiles(count(p.n, kTile)), states(tiles * kTile), chunks(count(p.length, kChunk)), rates(blocks * states),
        carried(blocks * states), B(kChunk * states), C(kChunk * states) {
    read(p.A + first * p.n, rates.data());
    for (Vec& rate : rates) rate *= kLog2e;
    read(state + (row * p.channels + first) * p.n, carried.data());
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
        B[k * states + i] = scalar(B_t[i]);
        C[k * states + i] = scalar(C_t[i]);
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
      if (p.z) z[k] = load(static_cast<const T*>(p.z) + (span.at + k) * p.z_step + channel);
      y[k] = skip * x[k];
    }
  }

  // What is computed after a block by a pass that takes chunks in this direction, 1 or -1.
  Place after(Place now, int64_t direction) const {
    return now.block + 1 < blocks ? Place{now.chunk, now.block + 1} : Place{now.chunk + direction, 0};
  }

  // What to ask for while a tile is computed: one line of each row of one array.
  Lines lines(Place place, const void* array, int64_t step) const {
    if (!array || place.chunk < 0 || place.chunk >= chunks) return no_lines();
    const int64_t at = row * p.length + place.chunk * kChunk;
    return {static_cast<const T*>(array) + at * step + channel(place.block), step * int64_t(sizeof(T))};
  }

  Lines no_lines() const { return {this, 0}; }  // to fetch from nowhere would cost a search for the page

  Lines input_lines(Place place, int64_t which) const {
    switch (which) {
      case 0: return lines(place, p.x, p.x_step);
      case 1: return lines(place, p.dt, p.dt_step);
      case 2: return lines(place, p.z, p.z_step);
    }
    return no_lines();
  }

  // (channel, state) in memory from and to (block, state) of vectors.
  void read(const float* from, Vec* to) const {
    for (int64_t c = 0; c < blocks * kLanes; ++c)
      for (int64_t i = 0; i < p.n; ++i) to[c / kLanes * states + i][c % kLanes] = from[c * p.n + i];
  }

  void write(const Vec* from, float* to) const {
    to += (row * p.channels + first) * p.n;
    for (int64_t c = 0; c < blocks * kLanes; ++c)
      for (int64_t i = 0; i < p.n; ++i) to[c * p.n + i] = from[c / kLanes * states + i][c % kLanes];
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
        for (int64_t tile = 0; tile < this->tiles; ++tile)
          scan_tile(span.size, block, tile,
                    tile == 3 ? this->lines({chunk, block}, out, p.channels)
                              : this->input_lines(this->after({chunk, block}, 1), tile));
        for (int64_t k = 0; k < span.size; ++k) {
          const Vec z = this->z[k], y = this->y[k];
          store(out + (span.at + k) * p.channels + channel, p.z ? y * z * sigmoid(z) : y);
        }
      }
    }
    this->write(this->carried.data(), last);
  }

  void scan_tile(int64_t size, int64_t block, int64_t tile, Lines next) {
    Vec h[kTile], rate[kTile];
    Vec* kept = &this->carried[block * this->states + tile * kTile];
    for (int i = 0; i < kTile; ++i) h[i] = kept[i];
    for (int i = 0; i < kTile; ++i) rate[i] = this->rates[block * this->states + tile * kTile + i];
    const float *B = &this->B[tile * kTile], *C = &this->C[tile * kTile];
    for (int64_t k = 0; k < size; ++k, B += this->states, C += this->states) {
      const Vec s = this->s[k], drive = this->drive[k];
      next.fetch(k);
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
  Vec dy[kChunk], dgate[kChunk], through_drive[kChunk], through_decay[kChunk];

  Backward(const Problem& p, int64_t row, int64_t group, int64_t groups, const float* dlast)
      : Worker<T>(p, row, group, groups, dlast), dA(this->rates.size()), dB(this->B.size()), dC(this->C.size()),
        dD(this->blocks), dbias(this->blocks) {}

  void run(float* borders, const T* dout, const Gradients& out) {
    const auto& p = this->p;
    for (int64_t chunk = this->chunks - 1; chunk >= 0; --chunk) {
      const Span span = this->open_chunk(chunk);
      for (int64_t block = 0; block < this->blocks; ++block) {
        if (block % kGroupBlocks == 0) {
          std::fill(dB.begin(), dB.end(), Vec{});
          std::fill(dC.begin(), dC.end(), Vec{});
        }
        this->open_block(span, this->channel(block));
        open_gradients(span, this->channel(block), dout);
        for (int64_t tile = 0; tile < this->tiles; ++tile) {
          const Place next = this->after({chunk, block}, -1);
          rebuild_tile(span.size, block, tile, this->border(borders, chunk, block),
                       tile == 3 ? border_lines(borders, next) : this->input_lines(next, tile));
          reverse_tile(span.size, block, tile,
                       tile == 0 ? this->lines(next, dout, p.channels) : output_lines({chunk, block}, tile, out));
        }
        close_gradients(span, block, out);
        if ((block + 1) % kGroupBlocks == 0 || block + 1 == this->blocks) {
          const int64_t group = this->channel(block) / kGroup;
          write_sums(span, dB, out.B + group * p.batch * p.length * p.n);
          write_sums(span, dC, out.C + group * p.batch * p.length * p.n);
        }
      }
    }
    this->write(dA.data(), out.A);
    this->write(this->carried.data(), out.state);
    for (int64_t block = 0; block < this->blocks; ++block) {
      store(out.D + this->row * p.channels + this->channel(block), dD[block]);
      if (p.dt_bias) store(out.dt_bias + this->row * p.channels + this->channel(block), dbias[block]);
    }
  }

  // Sums over the channels of the group, to (batch, length, n).
  void write_sums(Span span, const std::vector<Vec>& from, float* to) const {
    for (int64_t k = 0; k < span.size; ++k)
      for (int64_t i = 0; i < this->p.n; ++i)
        to[(span.at + k) * this->p.n + i] = sum(from[((i / kTile) * kChunk + k) * kTile + i % kTile]);
  }

  void open_gradients(Span span, int64_t channel, const T* dout) {
    for (int64_t k = 0; k < span.size; ++k) {
      dy[k] = load(dout + (span.at + k) * this->p.channels + channel);
      if (this->p.z) {
        const Vec z = this->z[k], gate = sigmoid(z);
        dgate[k] = dy[k] * gate * (1.0f + z * (1.0f - gate));
        dy[k] *= z * gate;
      }
      through_drive[k] = through_decay[k] = Vec{};
    }
  }

  Lines border_lines(float* borders, Place place) const {  // one of each state, of which there are about as many
    if (place.chunk < 0) return this->no_lines();
    return {this->border(borders, place.chunk, place.block), this->p.channels * int64_t(sizeof(float))};
  }

  Lines output_lines(Place place, int64_t which, const Gradients& out) const {
    switch (which) {
      case 1: return this->lines(place, out.x, this->p.channels);
      case 2: return this->lines(place, out.dt, this->p.channels);
      case 3: return this->lines(place, out.z, this->p.channels);
    }
    return this->no_lines();
  }

  void rebuild_tile(int64_t size, int64_t block, int64_t tile, const float* border, Lines next) {
    Vec h[kTile], rate[kTile];
    for (int i = 0; i < kTile; ++i)
      h[i] = tile * kTile + i < this->p.n ? load(border + (tile * kTile + i) * this->p.channels) : Vec{};
    for (int i = 0; i < kTile; ++i) rate[i] = this->rates[block * this->states + tile * kTile + i];
    const int64_t base = tile * kChunk * kTile;
    for (int64_t k = 0; k < size; ++k) {
      const float *B = &this->B[k * this->states + tile * kTile], *C = &this->C[k * this->states + tile * kTile];
      const Vec s = this->s[k], drive = this->drive[k], dy_t = dy[k];
      next.fetch(k);
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

  void reverse_tile(int64_t size, int64_t block, int64_t tile, Lines next) {
    const int64_t base = tile * kChunk * kTile, offset = block * this->states + tile * kTile;
    Vec g[kTile], rate[kTile], dA_t[kTile];
    for (int i = 0; i < kTile; ++i) {
      g[i] = this->carried[offset + i];
      rate[i] = this->rates[offset + i];
      dA_t[i] = dA[offset + i];
    }
    for (int64_t k = size - 1; k >= 0; --k) {
      const float *B = &this->B[k * this->states + tile * kTile], *C = &this->C[k * this->states + tile * kTile];
      const Vec s = this->s[k], drive = this->drive[k], dy_t = dy[k];
      next.fetch(k);
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

  void close_gradients(Span span, int64_t block, const Gradients& out) {
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
      if (p.z) store(static_cast<T*>(out.z) + to, dgate[k] * this->y[k]);
    }
  }
};

// Groups a part has: the wider it is, the longer the runs of memory that it reads, but threads get equal shares.
int64_t part_width(int64_t batch, int64_t groups, int threads) {
  for (int64_t width = groups; width > 1; --width)
    if (groups % width == 0 && batch * (groups / width) % threads == 0) return width;
  return 1;
}

// `work` on a row, a first group and a number of groups. Groups share nothing, so that the number of threads
// changes no bit.
template <class Work>
void for_all_parts(const Problem& p, int threads, Work work) {
  const int64_t groups = count(p.channels, kGroup), width = part_width(p.batch, groups, threads);
  const int64_t parts = groups / width;  // of a row
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < p.batch * parts; ++part) work(part / parts, part % parts * width, width);
}

template <class T>
void forward(const Problem& p, const float* state, void* y, float* borders, float* last, int threads) {
  for_all_parts(p, threads, [&](int64_t row, int64_t group, int64_t groups) {
    Forward<T>(p, row, group, groups, state).run(static_cast<T*>(y), borders, last);
  });
}

template <class T>
void backward(const Problem& p, float* borders, const void* dy, const float* dlast, const Gradients& out,
              int threads) {
  for_all_parts(p, threads, [&](int64_t row, int64_t group, int64_t groups) {
    Backward<T>(p, row, group, groups, dlast).run(borders, static_cast<const T*>(dy), out);
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
