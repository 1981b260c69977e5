// What one step works on: the description of a model, the rows to read, and one thread's tools.
#pragma once

#include "native_cache.h"

extern "C" {

// A stack of blocks, a diffuser or the latent attention, packed in the order of use; sizes that it has not are 0.
struct Part {
  int64_t kind;  // 0 blocks, 1 diffuser, 2 attention that is no block
  int64_t num_layers, ffn_dim;
  int64_t num_heads, num_kv_heads, head_dim, rope_dim, latent_dim, interleaved;
  int64_t d_inner, d_state, d_conv, dt_rank, gate;
  int64_t passes, reads_out;  // of a diffuser
  int64_t post_norm;          // of the attention that is no block
  int64_t state_bytes;        // of one row
  double eps;
  const char* weights;
  const int8_t* mixers;  // one a layer: 0 attention, 1 S6
  const float* rope;     // cosines, then sines (max_len, dim / 2)
  const float* noise;    // (max_len, d_model), each row padded to 16; null for zeros
  char* state;
};

// experts[num_experts] behind an optional attention; without a router the one expert is the whole model.
struct Model {
  int64_t d_model, vocab_size, max_len, num_experts;
  int64_t raw_input, mixes_probabilities;
  int64_t span, token_term;  // of the router's mean
  double tau, floor, decay, router_eps;
  const float* table;   // (vocab_size, d_model)
  const float* router;  // weights (num_experts, d_model), the same of the token term, biases, gains; null for none
  float* router_state;  // (rows, num_experts + 1): sums and a count
  const char* head;
  const char* screen;          // the head in int8, see native_screen.h; null for none
  const float* screen_errors;  // (vocab_size)
  const Part *attention, *experts;
};

// Rows to read one token each: where their state lies, the token, its position.
struct Rows {
  int64_t count;
  const int64_t *slot, *token, *position;
  int64_t best;   // 0, or how many of the likeliest tokens' logits are wanted of the one row there is
  float* hidden;  // where that row of what the head reads goes, d_model padded
};
}

namespace {

// Vectors between the stages, shared by all threads.
struct Shared {
  int64_t streams = 1;  // a diffuser runs two side by side
  int64_t wide_size = 0, mixed_size = 0, inner = 0, small_size = 0, absorbed_size = 0;

  void fit(const Part& p) {
    const int64_t queries = round_up(p.num_heads * (p.head_dim + p.rope_dim), kLanes);
    const int64_t entries = p.latent_dim ? p.latent_dim + p.rope_dim : 2 * p.num_kv_heads * p.head_dim;
    const int64_t latents = p.num_heads * round_up(p.latent_dim, kLanes);
    streams = std::max(streams, int64_t(p.kind == 1 ? 2 : 1));
    wide_size = std::max({wide_size, queries + entries, p.ffn_dim, p.d_inner});
    mixed_size = std::max({mixed_size, p.num_heads * p.head_dim, p.d_inner, latents});
    inner = std::max(inner, p.d_inner);
    small_size = std::max(small_size, p.dt_rank + 2 * p.d_state);
    absorbed_size = std::max(absorbed_size, latents);
  }

  Shared(const Model& m, int64_t rows) {
    if (m.attention) fit(*m.attention);
    for (int64_t e = 0; e < m.num_experts; ++e) fit(m.experts[e]);
    x = Matrix(streams * rows, m.d_model), wide = Matrix(streams * rows, wide_size);
    mixed = Matrix(streams * rows, mixed_size), z = Matrix(rows, inner), small = Matrix(rows, small_size);
    absorbed = Matrix(rows, absorbed_size), given = Matrix(2 * rows, m.d_model), context = Matrix(rows, m.d_model);
    weights = Matrix(rows, m.num_experts);
  }

  Matrix x{0, 0}, wide{0, 0}, mixed{0, 0}, z{0, 0}, small{0, 0}, absorbed{0, 0}, given{0, 0}, context{0, 0};
  Matrix weights{0, 0};
  float least = 0;  // of the logits that are wanted
  Meeting meeting;
};

// Gain and shift behind a norm and gate before the residual sum, of one half of a block; null where there is none.
struct Half {
  const float *gain = nullptr, *shift = nullptr, *gate = nullptr;
};

// One thread's view of one step. Rows of the residual stream from `rows.count` on are a diffuser's noisy ones.
template <Kind K>
struct Worker {
  using Entry = Cached<K>;

  const Model& m;
  const Rows& rows;
  Shared& shared;
  const Part* part = nullptr;
  Stream weights;
  int64_t state_at = 0;  // bytes into a row's state
  Matrix normed, embedded, context, hidden, fused, latents;
  std::vector<float> query, scores;
  Operands operands;

  Worker(const Model& m, const Rows& rows, Shared& shared)
      : m(m), rows(rows), shared(shared), normed(shared.streams * rows.count, m.d_model),
        embedded(rows.count, m.d_model), context(rows.count, m.d_model), hidden(rows.count, m.d_model),
        fused(rows.count * (m.mixes_probabilities ? m.num_experts : 1), m.d_model), latents(rows.count, m.d_model),
        scores(round_up(m.max_len, kLanes)) {}

  // Let every thread finish what the next stage reads.
  void meet() { shared.meeting.wait(); }

  void begin(const Part& next) {
    part = &next, weights = Stream(next.weights), state_at = 0;
    query.assign(round_up(next.latent_dim + next.head_dim + next.rope_dim, kLanes), 0.0f);
  }

  char* state(int64_t row) const { return part->state + rows.slot[row] * part->state_bytes + state_at; }

  // write(row, place of the first result, 16 results) for `rows_of_matrix` results of each row of `of` in `span`.
  template <Kind Of = K, class Write>
  void multiply(int64_t rows_of_matrix, int64_t cols, const Matrix& of, Span span, Write write) {
    operands.template set<Of>(of[span.first], of.stride, span.size(), cols);
    weights.template panels<Of>(rows_of_matrix, cols, operands, [&](int64_t row, int64_t panel, const Vec* v) {
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = panel * kPanel + j * kLanes;
        if (at < rows_of_matrix) write(span.first + row, at, v[j]);
      }
    });
  }

  // The same to `to`, from its column `offset` (a multiple of 16) on.
  void multiply_to(Matrix& to, int64_t offset, int64_t rows_of_matrix, int64_t cols, const Matrix& of, Span span) {
    multiply(rows_of_matrix, cols, of, span,
             [&](int64_t row, int64_t at, Vec v) { store(to[row] + offset + at, v); });
  }

  // Several matrices (rows_of_matrix, cols), each for its own `cols` columns of a row of `of`.
  void multiply_heads(Matrix& to, int64_t spacing, int64_t heads, int64_t rows_of_matrix, int64_t cols,
                      const Matrix& of, int64_t of_spacing) {
    const int64_t each = round_up(rows_of_matrix, kPanel) / kPanel;
    const Span mine = share(heads * each);
    Matrix slice(rows.count, cols);
    for (int64_t h = mine.first / each; h < heads && h * each < mine.last; ++h) {
      for (int64_t b = 0; b < rows.count; ++b)
        std::memcpy(slice[b], of[b] + h * of_spacing, cols * sizeof(float));
      operands.template set<K>(slice[0], slice.stride, rows.count, cols);
      const Span range{std::max(mine.first, h * each), std::min(mine.last, (h + 1) * each)};
      weights.template panels_of<K>(range, cols, operands, [&](int64_t row, int64_t panel, const Vec* v) {
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = (panel - h * each) * kPanel + j * kLanes;
          if (at < rows_of_matrix) store_part(to[row] + h * spacing + at, v[j], rows_of_matrix - at);
        }
      });
    }
    weights.template skip<K>(heads * each * kPanel, cols);
  }

  // Every thread does this for itself: it is shorter than a meeting.
  void normalise(const Matrix& from, Span span, const Half* halves) {
    for (int64_t row = span.first; row < span.last; ++row)
      normalise_row(from[row], normed[row], m.d_model, part->eps, halves[row >= rows.count]);
  }

  static void normalise_row(const float* from, float* to, int64_t size, double eps, const Half& half) {
    Vec squares = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec v = load_part(from + i, size - i);
      squares += v * v;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / float(size) + float(eps));
    for (int64_t i = 0; i < size; i += kLanes) {
      Vec v = load_part(from + i, size - i) * factor;
      if (half.gain) v *= load<Vec>(half.gain + i);
      if (half.shift) v += load<Vec>(half.shift + i);
      store_part(to + i, v, size - i);
    }
  }

  void add_to_residual(int64_t cols, const Matrix& from, Span span, const Half* halves) {
    multiply(m.d_model, cols, from, span, [&](int64_t row, int64_t at, Vec v) {
      const float* gate = halves[row >= rows.count].gate;
      float* x = shared.x[row] + at;
      store(x, load<Vec>(x) + (gate ? v * load<Vec>(gate + at) : v));
    });
    meet();
  }
};

}  // namespace
