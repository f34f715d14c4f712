// Threads: a pointer to torch's parallel_for, set by Python when it loads the module. Without it, serial.
#pragma once
#include <cstdint>
#include <stdexcept>

namespace embedfuse {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFn, void*);

struct ThreadPool {
  ParallelFor parallel_for = nullptr;
  int32_t (*num_threads)(uint32_t*) = nullptr;
};
extern ThreadPool thread_pool;

// Throws std::runtime_error when `fn` threw on one of the threads.
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context) {
  if (thread_pool.parallel_for && end - begin > grain) {
    if (thread_pool.parallel_for(begin, end, grain, fn, context) != 0) {
      throw std::runtime_error("embedfuse: a kernel's thread failed, most likely out of memory");
    }
  } else if (end > begin) {
    fn(begin, end, context);
  }
}

// To wake another thread costs microseconds, so each gets at least this much work, which takes 5 to 20 us. Counted are
// weights that are read from memory and multiplied; an element of a norm counts as 4 of them, an exponential as 8, a
// lookup as 16, four products of attention as 1.
constexpr int64_t kThreadWork = 65536;

// The least number of items for a thread, each of so many units.
inline int64_t grain_of(int64_t work) { return kThreadWork / (work + 1) + 1; }

inline int64_t num_threads() {
  uint32_t n = 1;
  if (thread_pool.num_threads) thread_pool.num_threads(&n);
  return n;
}

}  // namespace embedfuse
