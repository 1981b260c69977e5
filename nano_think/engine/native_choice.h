// The next token of a row from its logits: temperature, top-k, top-p, the draw, and the token's log-probability.
//
// `sampling.py` says what is meant and is the reference. Sums are kept in fp64, by stretches, so that a draw walks
// through one of them only; exponentials are fp32. Tokens are not sorted to find the likeliest: they are weighed in
// bins of equal width, and the one bin in which a limit falls is sorted.
#pragma once

#include <limits>
#include <numeric>

#include "native_vectors.h"

namespace {

constexpr int64_t kStretch = 512, kBins = 1024;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

class Choice {
 public:
  Choice(const float* logits, int64_t size) : logits_(logits), size_(size) {}

  // The most likely token, the first of equal ones; -1 where a logit is no number or none is finite.
  int64_t best() {
    int64_t home = 0;
    Ints bad = {};
    for (int64_t first = 0; first < size_; first += kStretch) {
      Vec most = Vec{} + kNothing;
      for (int64_t i = first; i < end_of(first); i += kLanes) {
        const Vec v = at(i);
        bad |= v != v;
        most = larger(v, most);
      }
      if (largest(most) > top_) top_ = largest(most), home = first;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane)
      if (bad[lane]) return -1;
    return std::isfinite(top_) ? std::find(logits_ + home, logits_ + size_, top_) - logits_ : -1;
  }

  // Divide the logits by it from now on.
  void set_temperature(double temperature) { sharpness_ = float(std::min(1.0 / temperature, 1e30)); }

  // Keep k tokens.
  void limit_number(int64_t k) {
    limit(double(k), [&](int64_t i) { return kept(i, Vec{} + 1.0f); });
  }

  // Keep as many as it takes for this share of the probability of those kept so far.
  void limit_probability(double share) {
    limit(share * weigh(), [&](int64_t i) { return weights(i); });
  }

  // The sum of exp((logit - largest) / temperature) of the tokens that are kept.
  double weigh() {
    sums_.clear();
    for (int64_t first = 0; first < size_; first += kStretch) {
      Vec total = {};
      for (int64_t i = first; i < end_of(first); i += kLanes) total += weights(i);
      sums_.push_back(sum(total));
    }
    return std::accumulate(sums_.begin(), sums_.end(), 0.0);
  }

  // The first token up to which the weights, in the order of the tokens, sum up to more than `uniform` of all.
  int64_t draw(double uniform) {
    const double total = weigh(), target = std::min(uniform * total, std::nextafter(total, 0.0));
    size_t stretch = 0;
    double held = 0;
    while (held + sums_[stretch] <= target) held += sums_[stretch++];
    int64_t token = -1;
    const int64_t first = int64_t(stretch) * kStretch;
    for (int64_t i = first; i < end_of(first) && held <= target; i += kLanes) {
      const Vec own = weights(i);
      for (int64_t lane = 0; lane < kLanes && held <= target; ++lane)
        if (own[lane] > 0) token = i + lane, held += own[lane];
    }
    return token;
  }

  double less_best(int64_t token) const { return double(logits_[token]) - top_; }

 private:
  int64_t end_of(int64_t first) const { return std::min(first + kStretch, size_); }

  Vec at(int64_t i) const {
    if (i + kLanes <= size_) return load<Vec>(logits_ + i);
    Vec v = Vec{} + kNothing;
    std::memcpy(&v, logits_ + i, (size_ - i) * sizeof(float));
    return v;
  }

  // v where the token may be drawn, 0 elsewhere.
  Vec kept(int64_t i, Vec v) const {
    Ints id;
    for (int32_t lane = 0; lane < kLanes; ++lane) id[lane] = lane;
    const Vec own = at(i);
    return as_floats(load<Ints>(&v) & ((own > least_) | ((own == least_) & (id <= int32_t(last_ - i)))));
  }

  Vec weights(int64_t i) const { return kept(i, exp_((at(i) - top_) * sharpness_)); }

  // Keep the likeliest tokens alone, as many as it takes for their weights of(i) to reach `amount`; all if none do.
  template <class Of>
  void limit(double amount, Of of) {
    Vec lowest = Vec{} + top_;
    for (int64_t i = 0; i < size_; i += kLanes) {
      const Vec v = at(i);
      lowest = (v > kNothing) & (v < lowest) ? v : lowest;
    }
    const float range = top_ + largest(-lowest), scale = range > 0 ? float(kBins - 1) / range : 0.0f;
    const auto bins_of = [&](int64_t i) {
      const Vec place = (top_ - at(i)) * scale, end = Vec{} + float(kBins - 1);
      return __builtin_convertvector(place < end ? place : end, Ints);  // also where it is no number
    };
    std::vector<double> bins(kBins);
    for (int64_t i = 0; i < size_; i += kLanes) {
      const Vec own = of(i);
      const Ints bin = bins_of(i);
      for (int64_t lane = 0; lane < kLanes; ++lane) bins[bin[lane]] += own[lane];
    }
    double held = 0;
    int32_t crossed = 0;
    while (crossed < kBins - 1 && held + bins[crossed] < amount) held += bins[crossed++];
    struct Token {
      float logit, weight;
      int64_t id;
    };
    std::vector<Token> inside;
    for (int64_t i = 0; i < size_; i += kLanes) {
      const Vec own = of(i);
      const Ints bin = bins_of(i);
      for (int64_t lane = 0; lane < kLanes; ++lane)
        if (bin[lane] == crossed && own[lane] > 0) inside.push_back({logits_[i + lane], own[lane], i + lane});
    }
    std::sort(inside.begin(), inside.end(), [](const Token& a, const Token& b) {
      return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    });
    for (const Token& token : inside) {
      least_ = token.logit, last_ = token.id, held += token.weight;
      if (held >= amount) break;
    }
  }

  const float* logits_;
  int64_t size_;
  float top_ = kNothing, sharpness_ = 1.0f;
  // A token may be drawn if it is likelier than `least_`, or as likely and not behind `last_`.
  float least_ = kNothing;
  int64_t last_ = -1;
  std::vector<double> sums_;
};

inline double logprob(const float* logits, int64_t size, int64_t token) {
  Choice choice(logits, size);
  choice.best();
  const double all = choice.weigh();
  return choice.less_best(token) - std::log(all);
}

// top_k: 0 for no limit; top_p: 1 for none. Returns -1 where nothing can be drawn.
inline int64_t choose(const float* logits, int64_t size, double temperature, int64_t top_k, double top_p,
                      double uniform, double* logprob) {
  Choice choice(logits, size);
  int64_t token = choice.best();
  if (token < 0) return token;
  const double all = choice.weigh();
  if (temperature > 0) {
    choice.set_temperature(temperature);
    if (top_k && top_k < size) choice.limit_number(top_k);
    if (top_p < 1) choice.limit_probability(top_p);
    token = choice.draw(uniform);
  }
  *logprob = choice.less_best(token) - std::log(all);
  return token;
}

}  // namespace
