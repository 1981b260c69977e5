// Whole networks: stacks of blocks, the diffuser, and the model that routes among them and reads out.
#pragma once

#include "native_screen.h"

namespace {

// Blocks of attention or S6, with or without SwiGLU; leaves the normed rows in `hidden`.
template <Kind K>
void stack(Worker<K>& w, const Matrix& input) {
  const Part& p = *w.part;
  const Span all{0, w.rows.count};
  const Half plain[2] = {};
  const int64_t d_model = w.m.d_model;
  w.normalise(input, all, plain);
  w.multiply_to(w.shared.x, 0, d_model, d_model, w.normed, all);
  w.meet();
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    const Half mixer[2] = {{w.weights.floats(d_model)}};
    if (p.mixers[layer]) {
      scan(w, mixer);
    } else {
      attention(w, w.shared.x, all, true, mixer);
      w.add_to_residual(p.num_heads * p.head_dim, w.shared.mixed, all, mixer);
    }
    if (p.ffn_dim) {
      const Half ffn[2] = {{w.weights.floats(d_model)}};
      feed_forward(w, all, ffn);
    }
  }
  const Half last[2] = {{w.weights.floats(d_model)}};
  w.normalise(w.shared.x, all, last);
  for (int64_t b = 0; b < w.rows.count; ++b) std::copy_n(w.normed[b], w.hidden.stride, w.hidden[b]);
}

// The layers of a diffuser. In the first pass the clean stream goes through them beside the noisy one, so that
// both use a weight while it is at hand; it stops at the last layer's keys and values, which nobody reads after.
template <Kind K>
void denoise(Worker<K>& w, const float* modulations, int64_t pass) {
  const Part& p = *w.part;
  const int64_t count = w.rows.count, size = round_up(w.m.d_model, kLanes);
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    Half mixer[2], ffn[2];
    for (int64_t stream = 0; stream < 2; ++stream) {
      const float* at = modulations + ((stream ? 1 + pass : 0) * p.num_layers + layer) * 6 * size;
      mixer[stream] = {at, at + size, at + 2 * size}, ffn[stream] = {at + 3 * size, at + 4 * size, at + 5 * size};
    }
    const bool clean = pass == 0 && layer + 1 < p.num_layers;
    const Span span{clean ? 0 : count, 2 * count};
    attention(w, w.shared.x, span, pass == 0, mixer);
    w.add_to_residual(p.num_heads * p.head_dim, w.shared.mixed, span, mixer);
    feed_forward(w, span, ffn);
  }
}

// x0 = clamp(A prediction + B latent), to `hidden`, and the latent of the next level, P x0 + Q latent.
template <Kind K>
void estimate(Worker<K>& w, const Matrix& prediction, const float* level) {
  const int64_t size = w.hidden.stride;
  const float *A = level, *B = level + size, *scalars = B + size;
  const Vec limit = Vec{} + scalars[2];
  for (int64_t b = 0; b < w.rows.count; ++b)
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec latent = load<Vec>(w.latents[b] + i);
      Vec x0 = load<Vec>(A + i) * load<Vec>(prediction[b] + i) + load<Vec>(B + i) * latent;
      x0 = x0 > limit ? limit : x0 < -limit ? -limit : x0;
      store(w.hidden[b] + i, x0);
      store(w.latents[b] + i, scalars[0] * x0 + scalars[1] * latent);
    }
}

// One clean pass and p.passes noisy ones; leaves what the head reads in `hidden`.
template <Kind K>
void diffuse(Worker<K>& w, const Matrix& input) {
  const Part& p = *w.part;
  const int64_t count = w.rows.count, d_model = w.m.d_model, size = round_up(d_model, kLanes);
  const Span all{0, count}, noisy{count, 2 * count};
  const Half plain[2] = {};
  Matrix &x = w.shared.x, &given = w.shared.given;  // given: adapted inputs, later predictions; then the context
  const float* modulations = w.weights.floats((1 + p.passes) * p.num_layers * 6 * size);
  const float* levels = w.weights.floats(p.passes * (2 * size + kLanes));
  w.normalise(input, all, plain);
  w.multiply_to(given, 0, d_model, d_model, w.normed, all);
  w.meet();
  w.multiply(d_model, d_model, given, all, [&](int64_t b, int64_t at, Vec v) { store(given[count + b] + at, v); });
  for (int64_t b = 0; b < count; ++b)
    if (p.noise)
      std::copy_n(p.noise + w.rows.position[b] * size, size, w.latents[b]);
    else
      std::fill_n(w.latents[b], size, 0.f);  // where another diffuser's may lie
  const Stream first = w.weights;
  for (int64_t pass = 0; pass < p.passes; ++pass) {
    w.weights = first, w.state_at = 0;
    w.multiply(d_model, d_model, w.latents, all, [&](int64_t b, int64_t at, Vec v) {
      const Vec context = load<Vec>(given[count + b] + at);  // of this thread
      store(x[count + b] + at, context + v);
      if (pass == 0) store(x[b] + at, context);
    });
    w.meet();
    denoise(w, modulations, pass);
    const Half last[2] = {{}, {w.weights.floats(d_model)}};
    w.normalise(x, noisy, last);
    w.multiply(d_model, d_model, w.normed, noisy,
               [&](int64_t row, int64_t at, Vec v) { store(given[row - count] + at, v); });
    w.meet();
    estimate(w, given, levels + pass * (2 * size + kLanes));
  }
  if (p.reads_out) {
    w.multiply_to(x, 0, d_model, d_model, w.hidden, all);
    const Half gain{w.weights.floats(d_model)};
    w.meet();
    for (int64_t b = 0; b < count; ++b) w.normalise_row(x[b], w.hidden[b], d_model, p.eps, gain);
  } else {
    const float *deviation = w.weights.floats(size), *mean = w.weights.floats(size);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = 0; i < size; i += kLanes)
        store(w.hidden[b] + i, load<Vec>(w.hidden[b] + i) * load<Vec>(deviation + i) + load<Vec>(mean + i));
  }
}

// What the router reads: the embedding plus what attention adds to it.
template <Kind K>
void see_context(Worker<K>& w) {
  const Span all{0, w.rows.count};
  if (!w.m.attention) {
    w.context = w.embedded;
    return;
  }
  w.begin(*w.m.attention);
  const Part& p = *w.part;
  const Half norm[2] = {{w.weights.floats(w.m.d_model)}};
  if (p.latent_dim)
    latent_attention(w, w.embedded, norm);
  else
    attention(w, w.embedded, all, true, norm);
  w.multiply(w.m.d_model, p.num_heads * p.head_dim, p.latent_dim ? w.shared.wide : w.shared.mixed, all,
             [&](int64_t b, int64_t at, Vec v) { store(w.shared.context[b] + at, v + load<Vec>(w.embedded[b] + at)); });
  const Half behind{p.post_norm ? w.weights.floats(w.m.d_model) : nullptr};
  w.meet();
  for (int64_t b = 0; b < all.last; ++b)
    if (p.post_norm)
      w.normalise_row(w.shared.context[b], w.context[b], w.m.d_model, p.eps, behind);
    else
      std::copy_n(w.shared.context[b], w.context.stride, w.context[b]);
}

// softmax of (mean of W c over the positions so far + b) / tau, by the first thread; others read it much later.
template <Kind K>
void route(Worker<K>& w) {
  const Model& m = w.m;
  const int64_t experts = m.num_experts, size = w.context.stride;
  const float *token_weight = m.router + experts * size, *bias = token_weight + experts * size;
  const auto product = [&](const float* row, const float* x) {
    Vec total = {};
    for (int64_t i = 0; i < size; i += kLanes) total += load<Vec>(row + i) * load<Vec>(x + i);
    return sum(total);
  };
  for (int64_t b = 0; b < w.rows.count; ++b) {
    float *state = m.router_state + w.rows.slot[b] * (experts + 1), *weights = w.shared.weights[b];
    const bool counts = m.span == 0 || w.rows.position[b] < m.span;
    w.normalise_row(w.context[b], w.normed[0], m.d_model, m.router_eps, {});
    float &number = state[experts], most = -INFINITY, total = 0;
    number = float(counts) + float(m.decay) * number;
    for (int64_t e = 0; e < experts; ++e) {
      state[e] = (counts ? product(m.router + e * size, w.normed[0]) : 0.0f) + float(m.decay) * state[e];
      weights[e] = state[e] / std::max(number, 1.0f) + bias[e];
      if (m.token_term) weights[e] += product(token_weight + e * size, w.normed[0]);
      weights[e] /= float(m.tau);
      most = std::max(most, weights[e]);
    }
    for (int64_t e = 0; e < experts; ++e) total += weights[e] = std::exp(weights[e] - most);
    for (int64_t e = 0; e < experts; ++e)
      weights[e] = float(1 - m.floor * double(experts)) * (weights[e] / total) + float(m.floor);
  }
}

// log sum_e w_e softmax(l_e) of one row from its experts' logits, in place of the first expert's.
inline void pool(float* logits, int64_t stride, int64_t vocab_size, const float* weights, int64_t experts) {
  for (int64_t e = 0; e < experts; ++e) {
    float* own = logits + e * stride;
    Vec most = Vec{} + own[0], total = {};
    std::fill(own + vocab_size, own + stride, -INFINITY);
    for (int64_t i = 0; i < stride; i += kLanes) most = larger(load<Vec>(own + i), most);
    const float top = largest(most);
    for (int64_t i = 0; i < stride; i += kLanes) total += exp_(load<Vec>(own + i) - top);
    const float shift = std::log(std::max(weights[e], 1.17549435e-38f)) - top - std::log(sum(total));
    for (int64_t i = 0; i < vocab_size; i += kLanes) {
      const Vec own_part = load<Vec>(own + i) + shift;
      store(logits + i, e ? log_add_exp(load<Vec>(logits + i), own_part) : own_part);
    }
  }
}

// Logits of the rows in `fused` (count x (experts where probabilities are mixed), padded).
template <Kind K>
void read_out(Worker<K>& w, float* logits) {
  const Model& m = w.m;
  const int64_t count = w.rows.count, stride = round_up(m.vocab_size, kLanes);
  const int64_t outputs = m.mixes_probabilities ? m.num_experts : 1;
  w.weights = Stream(m.head);
  w.multiply(m.vocab_size, m.d_model, w.fused, {0, count * outputs},
             [&](int64_t row, int64_t at, Vec v) { store(logits + row * stride + at, v); });
  if (!m.mixes_probabilities) return;
  w.meet();
  const Span mine = share(count);
  for (int64_t b = mine.first; b < mine.last; ++b)
    pool(logits + b * outputs * stride, stride, m.vocab_size, w.shared.weights[b], outputs);
}

// The token's rows through the whole model, and its logits.
template <Kind K>
void run(Worker<K>& w, float* logits) {
  const Model& m = w.m;
  const int64_t count = w.rows.count, size = w.hidden.stride;
  for (int64_t b = 0; b < count; ++b)
    std::copy_n(m.table + w.rows.token[b] * m.d_model, m.d_model, w.embedded[b]);
  see_context(w);
  if (m.router && thread() == 0) route(w);
  const float* gains = m.router ? m.router + 2 * m.num_experts * size + m.num_experts : nullptr;
  for (int64_t e = 0; e < m.num_experts; ++e) {
    w.meet();  // the expert before may still be read
    w.begin(m.experts[e]);
    const Matrix& input = m.raw_input ? w.embedded : w.context;
    w.part->kind == 1 ? diffuse(w, input) : stack(w, input);
    for (int64_t b = 0; b < count; ++b) {
      const float scale = !m.router ? 1.0f : gains[e] * (m.mixes_probabilities ? 1.0f : w.shared.weights[b][e]);
      float* to = w.fused[m.mixes_probabilities ? b * m.num_experts + e : b];
      for (int64_t i = 0; i < size; i += kLanes) store(to + i, load<Vec>(to + i) + scale * load<Vec>(w.hidden[b] + i));
    }
  }
  if (w.rows.best) {
    if (thread() == 0) std::copy_n(w.fused[0], size, w.rows.hidden);
    screened(w, logits);
  } else {
    read_out(w, logits);
  }
}

}  // namespace
