// Threads: a pointer to torch's own parallel_for, given by Python at load. Without it, serial.
#pragma once
#include <cstdint>

namespace embedfuse {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFn, void*);

struct ThreadPool {
  ParallelFor parallel_for = nullptr;
  int32_t (*num_threads)(uint32_t*) = nullptr;
};
extern ThreadPool thread_pool;

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context) {
  if (thread_pool.parallel_for && end - begin > grain) {
    thread_pool.parallel_for(begin, end, grain, fn, context);
  } else if (end > begin) {
    fn(begin, end, context);
  }
}

inline int64_t num_threads() {
  uint32_t n = 1;
  if (thread_pool.num_threads) thread_pool.num_threads(&n);
  return n;
}

}  // namespace embedfuse
