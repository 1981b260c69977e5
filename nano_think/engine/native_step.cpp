// One token of every row of a batch in one call, and the packing of the weights that it streams.
//
// At batch 1 every weight is used once a token, so the time is that of reading the weights: they come in the order
// of use and are read forwards only. With more rows each weight is read once for all of them.
//
//   native_vectors.h   vectors, their functions, threads      native_layers.h  attention, feed-forward, scan
//   native_products.h  packed matrices times rows             native_model.h   stacks, diffuser, router, head
//   native_cache.h     keys and values, attention to them     native_screen.h  the head's likeliest tokens alone
//   native_worker.h    what Python hands over, buffers        native_choice.h  the next token from its logits

#include "native_choice.h"
#include "native_model.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

template <Kind K>
void step(const Model& model, const Rows& rows, float* logits, float* weights, int threads) {
  Shared shared(model, rows.count);
#pragma omp parallel num_threads(threads)
  {
    Worker<K> worker(model, rows, shared);
    run(worker, logits);
  }
  for (int64_t b = 0; b < rows.count && model.router; ++b)
    std::copy_n(shared.weights[b], model.num_experts, weights + b * model.num_experts);
}

template <Kind K>
void read_rows(const Model& model, const Rows& rows, const float* hidden, float* logits, int threads) {
  Shared shared(model, rows.count);
#pragma omp parallel num_threads(threads)
  {
    Worker<K> worker(model, rows, shared);
    std::copy_n(hidden, worker.fused.data.size(), worker.fused.data.begin());
    read_out(worker, logits);
  }
}

// A panel from the addresses of its rows (null for a row of zeros).
template <Kind K>
void pack_panel(const float* const* rows, int64_t cols, char* panel) {
  const int64_t padded = round_up(cols, 4);
  float scales[kPanel];
  if (K == Kind::int8) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      Vec most = {};
      for (int64_t k = 0; rows[lane] && k < cols; k += kLanes) {
        const Vec v = load_part(rows[lane] + k, cols - k);
        most = larger(most, larger(v, -v));
      }
      scales[lane] = largest(most) > 0 ? largest(most) / 127 : 1.0f;
    }
    std::memcpy(panel, scales, sizeof scales);
    panel += sizeof scales;
  }
  float part[kPanel][kLanes];
  for (int64_t k = 0; k < padded; k += kLanes) {
    for (int64_t lane = 0; lane < kPanel; ++lane)
      store(part[lane], rows[lane] && k < cols ? load_part(rows[lane] + k, cols - k) : Vec{});
    const int64_t width = std::min(kLanes, padded - k);
    if constexpr (K == Kind::fp32) {
      float* to = reinterpret_cast<float*>(panel) + k * kPanel;
      for (int64_t i = 0; i < width; ++i)
        for (int64_t lane = 0; lane < kPanel; ++lane) to[i * kPanel + lane] = part[lane][i];
    } else if constexpr (K == Kind::bf16) {
      uint16_t* to = reinterpret_cast<uint16_t*>(panel) + k * kPanel;
      for (int64_t i = 0; i < width; i += 2)
        for (int64_t lane = 0; lane < kPanel; ++lane)
          for (int64_t j = 0; j < 2; ++j) {
            const uint32_t bits = load<uint32_t>(&part[lane][i + j]);
            to[i * kPanel + lane * 2 + j] = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
          }
    } else {
      uint8_t* to = reinterpret_cast<uint8_t*>(panel) + k * kPanel;
      for (int64_t i = 0; i < width; i += 4)
        for (int64_t lane = 0; lane < kPanel; ++lane)
          for (int64_t j = 0; j < 4; ++j)
            to[i * kPanel + lane * 4 + j] = uint8_t(int32_t(std::nearbyint(part[lane][i + j] / scales[lane])) + 128);
    }
  }
}

template <Kind K>
void pack(const float* const* rows, int64_t panels, int64_t cols, char* to, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < panels; ++p) pack_panel<K>(rows + p * kPanel, cols, to + p * panel_bytes<K>(round_up(cols, 4)));
}

}  // namespace

extern "C" {

// kind: 0 fp32, 1 bf16, 2 int8. logits: a row for each of `rows` (for each expert where probabilities are mixed, of
// which the first holds the result), vocab_size rounded up to 16. weights: (rows, experts) of the router.
void native_step(const Model* model, int kind, const Rows* rows, float* logits, float* weights, int threads) {
  const auto call = kind == 0 ? step<Kind::fp32> : kind == 1 ? step<Kind::bf16> : step<Kind::int8>;
  call(*model, *rows, logits, weights, threads);
}

// Logits of `count` rows of what the head reads, each padded to 16; not where probabilities are mixed.
void native_read_out(const Model* model, int kind, const float* hidden, int64_t count, float* logits, int threads) {
  const auto call = kind == 0 ? read_rows<Kind::fp32> : kind == 1 ? read_rows<Kind::bf16> : read_rows<Kind::int8>;
  call(*model, Rows{count}, hidden, logits, threads);
}

// Whether products of int8 are faster here than those they spare.
int screens() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

// Tokens and their log-probabilities of `rows` rows of logits (rows, vocab_size), `stride` apart; token -1 where none
// can be drawn. uniform: a number in [0, 1) a row, null at temperature 0. top_k: 0 for no limit.
void choose_tokens(const float* logits, int64_t rows, int64_t vocab_size, int64_t stride, double temperature,
                   int64_t top_k, double top_p, const double* uniform, int64_t* tokens, double* logprobs, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    tokens[row] = choose(logits + row * stride, vocab_size, temperature, top_k, top_p, uniform ? uniform[row] : 0.0,
                         logprobs + row);
}

// Log-probabilities of one token of each row, as `choose_tokens` takes them.
void token_logprobs(const float* logits, int64_t rows, int64_t vocab_size, int64_t stride, const int64_t* tokens,
                    double* logprobs, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) logprobs[row] = logprob(logits + row * stride, vocab_size, tokens[row]);
}

// Pack a matrix of 64 x panels rows, given by the address of each, null for a row of zeros.
void pack_matrix(int kind, const float* const* rows, int64_t panels, int64_t cols, char* to, int threads) {
  const auto call = kind == 0 ? pack<Kind::fp32> : kind == 1 ? pack<Kind::bf16> : pack<Kind::int8>;
  call(rows, panels, cols, to, threads);
}

// Bytes that `pack_matrix` fills.
int64_t packed_bytes(int kind, int64_t panels, int64_t cols) {
  cols = round_up(cols, 4);
  return panels * (kind == 0   ? panel_bytes<Kind::fp32>(cols)
                   : kind == 1 ? panel_bytes<Kind::bf16>(cols)
                               : panel_bytes<Kind::int8>(cols));
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
