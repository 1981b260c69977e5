// The layers: rotary and latent attention, SwiGLU, the selective scan. Each ends with a meeting of the threads.
#pragma once

#include "native_worker.h"

namespace {

template <Kind K>
void feed_forward(Worker<K>& w, Span span, const Half* halves) {
  const int64_t ffn_dim = w.part->ffn_dim;
  w.normalise(w.shared.x, span, halves);
  w.operands.template set<K>(w.normed[span.first], w.normed.stride, span.size(), w.m.d_model);
  // 32 rows of the gate and 32 of the other branch share a panel
  w.weights.template panels<K>(2 * round_up(ffn_dim, kPanel / 2), w.m.d_model, w.operands,
                               [&](int64_t row, int64_t panel, const Vec* v) {
                                 for (int j = 0; j < kVectors / 2; ++j) {
                                   const int64_t at = panel * kPanel / 2 + j * kLanes;
                                   if (at < ffn_dim)
                                     store(w.shared.wide[span.first + row] + at, silu(v[j]) * v[j + kVectors / 2]);
                                 }
                               });
  w.meet();
  w.add_to_residual(ffn_dim, w.shared.wide, span, halves);
}

// queries: rows of the residual stream that attend. reads: whether the first stream's keys and values are new.
// A row attends to those of its own state, whichever stream it belongs to.
template <Kind K>
void attention(Worker<K>& w, const Matrix& from, Span queries, bool reads, const Half* halves) {
  using Entry = typename Worker<K>::Entry;
  const Part& p = *w.part;
  const int64_t count = w.rows.count, dim = p.head_dim, groups = p.num_kv_heads, heads = p.num_heads / groups;
  const int64_t entries_at = round_up(p.num_heads * dim, kLanes);
  Matrix& wide = w.shared.wide;
  w.normalise(from, {reads ? 0 : queries.first, queries.last}, halves);
  w.multiply_to(wide, 0, p.num_heads * dim, w.m.d_model, w.normed, queries);
  if (reads)
    w.multiply_to(wide, entries_at, 2 * groups * dim, w.m.d_model, w.normed, {0, count});
  else
    w.weights.template skip<K>(2 * groups * dim, w.m.d_model);
  w.meet();
  const int64_t key_size = KeysValues<Entry>::key_size(dim, w.m.max_len);
  const int64_t value_size = KeysValues<Entry>::value_size(dim, w.m.max_len);
  const Span mine = share(count * groups);
  for (int64_t item = mine.first; item < mine.last; ++item) {
    const int64_t b = item / groups, g = item % groups, position = w.rows.position[b];
    Entry* state = reinterpret_cast<Entry*>(w.state(b));
    const KeysValues<Entry> past{state + g * key_size, state + groups * key_size + g * value_size,
                                 round_up(dim, 4), dim, int64_t(w.scores.size())};
    const Rotation rotate(p.rope, w.m.max_len, position, dim, p.interleaved);
    std::fill(w.query.begin(), w.query.end(), 0.0f);
    if (reads) {
      const float *keys = wide[b] + entries_at, *values = keys + groups * dim;
      rotate(keys + g * dim, w.query.data(), 1.0f);
      past.remember(position, w.query.data(), dim, values + g * dim);
    }
    for (int64_t row = b; row < queries.last; row += count)
      for (int64_t h = g * heads; row >= queries.first && h < (g + 1) * heads; ++h) {
        rotate(wide[row] + h * dim, w.query.data(), 1.0f / std::sqrt(float(dim)));
        past.attend(w.query.data(), position + 1, w.scores.data(), w.shared.mixed[row] + h * dim);
      }
  }
  w.state_at += groups * (key_size + value_size) * int64_t(sizeof(Entry));
  w.meet();
}

// Keys [latent; rotary key], values the latents, the same for all heads: the up-projection of the keys is moved
// to the queries, that of the values behind the mean.
template <Kind K>
void latent_attention(Worker<K>& w, const Matrix& from, const Half* halves) {
  using Entry = typename Worker<K>::Entry;
  const Part& p = *w.part;
  const int64_t count = w.rows.count, latent = p.latent_dim, width = p.head_dim + p.rope_dim;
  const int64_t spacing = round_up(latent, kLanes), entries_at = round_up(p.num_heads * width, kLanes);
  Matrix &wide = w.shared.wide, &absorbed = w.shared.absorbed, &mixed = w.shared.mixed;
  const Half latent_norm{w.weights.floats(latent)};
  w.normalise(from, {0, count}, halves);
  w.multiply_to(wide, 0, p.num_heads * width, w.m.d_model, w.normed, {0, count});
  w.multiply_to(wide, entries_at, latent + p.rope_dim, w.m.d_model, w.normed, {0, count});
  w.meet();
  const auto past = [&](int64_t b) {
    Entry* keys = reinterpret_cast<Entry*>(w.state(b));
    const int64_t key_width = round_up(latent + p.rope_dim, 4), length = w.scores.size();
    return KeysValues<Entry>{keys, keys + KeysValues<Entry>::key_size(latent + p.rope_dim, length), key_width,
                             latent, length};
  };
  const auto rotation = [&](int64_t b) {
    return Rotation(p.rope, w.m.max_len, w.rows.position[b], p.rope_dim, p.interleaved);
  };
  const Span mine = share(count);
  for (int64_t b = mine.first; b < mine.last; ++b) {
    float* key = w.query.data();
    w.normalise_row(wide[b] + entries_at, key, latent, p.eps, latent_norm);
    rotation(b)(wide[b] + entries_at + latent, key + latent, 1.0f);
    past(b).remember(w.rows.position[b], key, latent + p.rope_dim, key);
  }
  w.multiply_heads(absorbed, spacing, p.num_heads, latent, p.head_dim, wide, width);
  w.meet();
  const Span heads = share(count * p.num_heads);
  std::fill(w.query.begin(), w.query.end(), 0.0f);
  const float scale = 1.0f / std::sqrt(float(width));
  for (int64_t item = heads.first; item < heads.last; ++item) {
    const int64_t b = item / p.num_heads, h = item % p.num_heads;
    for (int64_t k = 0; k < latent; ++k) w.query[k] = absorbed[b][h * spacing + k] * scale;
    rotation(b)(wide[b] + h * width + p.head_dim, w.query.data() + latent, scale);
    past(b).attend(w.query.data(), w.rows.position[b] + 1, w.scores.data(), mixed[b] + h * spacing);
  }
  w.meet();
  w.multiply_heads(wide, p.head_dim, p.num_heads, p.head_dim, latent, mixed, spacing);
  w.meet();
}

// h = exp(dt A) h + dt u B,  y = C h + D u, gated; dt, B, C chosen by u, the convolved input.
template <Kind K>
void scan(Worker<K>& w, const Half* halves) {
  const Part& p = *w.part;
  Shared& shared = w.shared;
  const Span all{0, w.rows.count};
  const int64_t size = round_up(p.d_inner, kLanes), taps = p.d_conv - 1;
  w.normalise(shared.x, all, halves);
  const float *kernel = w.weights.floats(p.d_conv * size), *bias = w.weights.floats(size);
  w.multiply(p.d_inner, w.m.d_model, w.normed, all, [&](int64_t row, int64_t at, Vec v) {
    float* window = reinterpret_cast<float*>(w.state(row)) + at;
    Vec u = load<Vec>(bias + at) + v * load<Vec>(kernel + taps * size + at);
    for (int64_t i = 0; i < taps; ++i) {
      u += load<Vec>(window + i * size) * load<Vec>(kernel + i * size + at);
      store(window + i * size, i + 1 < taps ? load<Vec>(window + (i + 1) * size) : v);
    }
    store(shared.wide[row] + at, silu(u));
  });
  if (p.gate)
    w.multiply(p.d_inner, w.m.d_model, w.normed, all,
               [&](int64_t row, int64_t at, Vec v) { store(shared.z[row] + at, silu(v)); });
  w.meet();
  w.multiply_to(shared.small, 0, p.dt_rank + 2 * p.d_state, p.d_inner, shared.wide, all);
  w.meet();
  const float *dt_bias = w.weights.floats(size), *rate = w.weights.floats(p.d_state * size);
  const float* skip = w.weights.floats(size);
  // the step sizes stay fp32: they decide over how many positions a channel remembers
  w.template multiply<Kind::fp32>(p.d_inner, p.dt_rank, shared.small, all, [&](int64_t row, int64_t at, Vec v) {
    float* state = reinterpret_cast<float*>(w.state(row)) + taps * size + at;
    const float *B = shared.small[row] + p.dt_rank, *C = B + p.d_state;
    const Vec u = load<Vec>(shared.wide[row] + at), dt = softplus(v + load<Vec>(dt_bias + at)), fed = dt * u;
    Vec y = load<Vec>(skip + at) * u;
    for (int64_t i = 0; i < p.d_state; ++i) {
      const Vec h = exp2_(dt * load<Vec>(rate + i * size + at)) * load<Vec>(state + i * size) + fed * B[i];
      store(state + i * size, h);
      y += h * C[i];
    }
    store(shared.mixed[row] + at, p.gate ? y * load<Vec>(shared.z[row] + at) : y);
  });
  w.state_at += (taps + p.d_state) * size * int64_t(sizeof(float));
  w.meet();
  w.add_to_residual(p.d_inner, shared.mixed, all, halves);
}

}  // namespace
