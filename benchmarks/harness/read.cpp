// Reads memory once, forwards, and does next to nothing with it: how fast can one core read?

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t kBytes = 64, kTogether = 8;  // bytes of a vector; sums that do not wait for each other
typedef int64_t Vec __attribute__((vector_size(kBytes)));

}  // namespace

extern "C" {

// The sum of the 64-bit words of a buffer, of which the last few are left out.
int64_t read_all(const char* at, int64_t bytes) {
  Vec sums[kTogether] = {};
  for (const char* end = at + bytes / (kBytes * kTogether) * (kBytes * kTogether); at < end;)
    for (int64_t i = 0; i < kTogether; ++i, at += kBytes) {
      Vec v;
      std::memcpy(&v, at, sizeof v);
      __builtin_prefetch(at + 4096);
      sums[i] += v;
    }
  int64_t total = 0;
  for (const Vec& sum : sums)
    for (int64_t i = 0; i < kBytes / 8; ++i) total += sum[i];
  return total;
}
}
