// The likeliest tokens of one row, without the whole head: it is half of the bytes of a step.
//
// A copy of the head in int8 gives every logit coarsely. By Cauchy and Schwarz it is wrong by no more than |x| times an
// error of its row: |row - its copy|, and what rounding of x and of the sums may add. Whose upper bound lies below the
// lower bounds of as many others as are wanted is none of them. The rest, a few dozen, are multiplied with x in the
// order of the columns, as the head multiplies them, so that their logits have its bits; those of all others are -inf.
#pragma once

#include "native_layers.h"

namespace {

// A number that at least `best` lower bounds reach: the largest of each panel's, of which the best-th is taken. That is
// hardly less than the best-th of all, and found without sorting them.
inline float least_of(const float* logits, const float* errors, int64_t size, float reach, int64_t best) {
  std::vector<float> most;
  for (int64_t first = 0; first < size; first += kPanel) {
    Vec lower = Vec{} - INFINITY;
    for (int64_t i = first; i < std::min(first + kPanel, size); i += kLanes)
      lower = larger(load<Vec>(logits + i) - reach * load<Vec>(errors + i), lower);
    most.push_back(largest(lower));
  }
  if (best > int64_t(most.size())) return -INFINITY;
  std::nth_element(most.begin(), most.begin() + best - 1, most.end(), std::greater<float>());
  return most[best - 1];
}

// A number as matrices of a kind keep it.
template <Kind K>
inline Vec kept_as(Vec v) {
  if constexpr (K != Kind::bf16) return v;
  const Ints bits = load<Ints>(&v);
  return as_floats((bits + 0x7FFF + ((bits >> 16) & 1)) & kUpper);
}

// Exact logits of up to 16 tokens, summed up as `product` does.
template <Kind K>
inline void exact(const Model& m, const float* x, const std::vector<int64_t>& tokens, float* logits) {
  const float* rows[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    rows[lane] = m.table + tokens[std::min<size_t>(lane, tokens.size() - 1)] * m.d_model;
  Vec total = {};
  for (int64_t k = 0; k < m.d_model; ++k) {
    Vec column;
    for (int64_t lane = 0; lane < kLanes; ++lane) column[lane] = rows[lane][k];
    total += kept_as<K>(column) * x[k];
  }
  for (size_t lane = 0; lane < tokens.size(); ++lane) logits[tokens[lane]] = total[lane];
}

// Logits of one row: exact for w.rows.best tokens at least, with all that could be among them, -inf for the rest.
template <Kind K>
void screened(Worker<K>& w, float* logits) {
  const Model& m = w.m;
  const float* x = w.fused[0];
  const int64_t size = round_up(m.vocab_size, kLanes);
  Vec squares = {};
  for (int64_t i = 0; i < w.fused.stride; i += kLanes) squares += load<Vec>(x + i) * load<Vec>(x + i);
  const float reach = std::sqrt(sum(squares)) * 1.0001f;
  const Span mine = share(size / kLanes);
  if (!std::isfinite(reach)) {
    std::fill(logits + mine.first * kLanes, logits + mine.last * kLanes, NAN);
    return;
  }
  w.weights = Stream(m.screen);
  w.template multiply<Kind::int8>(m.vocab_size, m.d_model, w.fused, {0, 1},
                                  [&](int64_t, int64_t at, Vec v) { store(logits + at, v); });
  w.meet();
  if (thread() == 0) w.shared.least = least_of(logits, m.screen_errors, size, reach, w.rows.best);
  w.meet();
  std::vector<int64_t> tokens;
  for (int64_t at = mine.first * kLanes; at < mine.last * kLanes; at += kLanes) {
    const Ints wanted = load<Vec>(logits + at) + reach * load<Vec>(m.screen_errors + at) >= w.shared.least;
    store(logits + at, Vec{} - INFINITY);
    int32_t some = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) some |= wanted[lane];
    if (!some) continue;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (!wanted[lane] || at + lane >= m.vocab_size) continue;
      tokens.push_back(at + lane);
      if (tokens.size() == kLanes) exact<K>(m, x, tokens, logits), tokens.clear();
    }
  }
  if (!tokens.empty()) exact<K>(m, x, tokens, logits);
}

}  // namespace
