// The part of CUDA C++ that csrc/cuda uses, on the host. A launch starts a thread for each of a block's threads;
// blocks run one after the other, each on shared memory that holds garbage, NaN where it is read as floats. The
// process ends where a GPU would wait for ever or compute anything; a launch that it refuses is an error, as there.
//
// test_cuda_emulated.py rewrites launches and `extern __shared__` and puts this in place of CUDA's headers.
// Not seen: races between blocks, and the timing of a warp, whose threads are as independent as a block's.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "embedfuse/dtype.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("cuda_shared")))
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulated {

constexpr unsigned kWarpThreads = 32, kMaxThreads = 1024;
constexpr int64_t kMaxBlocks = (1ll << 31) - 1;
constexpr size_t kSharedBytes = 48 * 1024, kSharedBytesOptIn = 227 * 1024;
constexpr uint32_t kGarbage = 0x7fc5a5a5;  // NaN as fp32 and, in its upper half, as bf16

[[noreturn]] inline void refuse(const char* what) {
  static std::mutex first;  // which of several threads speaks
  first.lock();
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

// Threads wait until all that have not left are there. Waiting threads see what the others wrote before.
struct Barrier {
  std::mutex mutex;
  unsigned members = 0, arrived = 0;
  std::atomic<unsigned> round{0};

  void reset(unsigned count) { members = count, arrived = 0; }
  template <class Last>
  void wait(Last last) {
    std::unique_lock lock(mutex);
    const unsigned mine = round.load();
    if (++arrived == members) return last(), open();
    lock.unlock();
    round.wait(mine);
  }
  void leave() {
    std::lock_guard lock(mutex);
    if (--members != 0 && arrived == members) open();
  }
  void open() {
    arrived = 0;
    ++round;
    round.notify_all();
  }
};

struct Warp {
  Barrier barrier;
  std::atomic<unsigned> at_barrier{0}, in_warp{0}, left{0};
  uint64_t values[2][kWarpThreads];
};

struct Block {
  Barrier barrier, end;
  Warp warps[kMaxThreads / kWarpThreads];
  std::vector<uint32_t> dynamic;
};
inline Block block;
inline thread_local unsigned turn =
    0;  // which of the two rows of values the warp's next exchange uses

inline Warp& warp() { return block.warps[threadIdx.x / kWarpThreads]; }
inline unsigned lane() { return threadIdx.x % kWarpThreads; }
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block.dynamic.data());
}

// Not instrumented: with AddressSanitizer there are forbidden bytes between the variables.
__attribute__((no_sanitize("address", "undefined"))) inline void poison_static() {
  volatile char* garbage = __start_cuda_shared;
  for (size_t i = 0; garbage + i < __stop_cuda_shared; ++i)
    garbage[i] = char(kGarbage >> i % 4 * 8);
}

inline void begin_block() {
  poison_static();
  block.dynamic.assign(block.dynamic.size(), kGarbage);
  block.barrier.reset(blockDim.x);
  for (unsigned w = 0; w < kMaxThreads / kWarpThreads; ++w) {
    const unsigned first = w * kWarpThreads;
    block.warps[w].barrier.reset(first < blockDim.x ? std::min(blockDim.x - first, kWarpThreads)
                                                    : 0);
    block.warps[w].left = 0;
  }
}

inline void end_thread() {
  if (warp().in_warp != 0) refuse("a thread left while its warp exchanges values");
  ++warp().left;
  block.barrier.leave();
}

// The values of all lanes, in memory that the exchange after the next one uses again.
inline const uint64_t* exchange(unsigned mask, uint64_t mine) {
  Warp& w = warp();
  if (mask != ~0u || blockDim.x % kWarpThreads != 0) refuse("an exchange by less than a warp");
  if (w.left != 0) refuse("an exchange with threads that have left");
  if (w.at_barrier != 0) refuse("an exchange with threads that wait in __syncthreads");
  ++w.in_warp;
  uint64_t* values = w.values[turn];
  turn = 1 - turn;
  values[lane()] = mine;
  w.barrier.wait([&w] { w.in_warp = 0; });
  return values;
}

inline std::map<const void*, size_t> opted_in;
inline thread_local cudaError_t last_error = cudaSuccess;
inline std::string launches;  // "kernel blocks threads bytes" per line

template <class... Parameters>
struct Launch {
  const char* name;
  void (*kernel)(Parameters...);
  int64_t blocks, threads;
  size_t bytes;

  void operator()(Parameters... parameters) const {
    const auto opted = opted_in.find((const void*)kernel);
    const size_t limit = opted == opted_in.end() ? kSharedBytes : opted->second;
    const bool fits = blocks > 0 && blocks <= kMaxBlocks && threads > 0 && threads <= kMaxThreads;
    if (!fits || bytes > limit) {
      last_error = cudaErrorInvalidConfiguration;
      return;
    }
    launches += std::string(name) + " " + std::to_string(blocks) + " " + std::to_string(threads) +
                " " + std::to_string(bytes) + "\n";
    blockDim.x = unsigned(threads), gridDim.x = unsigned(blocks);
    block.dynamic.resize((bytes + 3) / 4);
    block.end.reset(blockDim.x);
    begin_block();
    std::vector<std::thread> team;
    for (unsigned t = 0; t < blockDim.x; ++t) {
      team.emplace_back([&, t] {
        threadIdx.x = t;
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
          kernel(parameters...);
          end_thread();
          block.end.wait(begin_block);
        }
      });
    }
    for (std::thread& thread : team) thread.join();
  }
};
template <class... Parameters>
Launch<Parameters...> launch(const char* name, void (*kernel)(Parameters...), int64_t blocks,
                             int64_t threads, size_t bytes, cudaStream_t) {
  return {name, kernel, blocks, threads, bytes};
}

}  // namespace emulated

inline void __syncthreads() {
  using namespace emulated;
  if (warp().in_warp != 0) refuse("__syncthreads while the warp exchanges values");
  ++warp().at_barrier;
  block.barrier.wait([] {
    for (Warp& w : block.warps) w.at_barrier = 0;
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  std::memcpy(&value, emulated::exchange(mask, bits) + (emulated::lane() ^ step), sizeof(T));
  return value;
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = emulated::exchange(mask, vote);
  unsigned bits = 0;
  for (unsigned i = 0; i < emulated::kWarpThreads; ++i) bits |= unsigned(votes[i]) << i;
  return bits;
}

// Relaxed, as on the GPU: they order nothing else.
template <class T>
T atomicCAS(T* p, T expected, T wanted) {
  __atomic_compare_exchange_n(p, &expected, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMax(T* p, T value) {
  T found = __atomic_load_n(p, __ATOMIC_RELAXED);
  for (T before; found < value; found = before) {
    if ((before = atomicCAS(p, found, value)) == found) break;
  }
  return found;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float x) { return embedfuse::float_bits(x); }
[[noreturn]] inline void __trap() { emulated::refuse("__trap"); }

using __half = embedfuse::f16;
using __nv_bfloat16 = embedfuse::bf16;
inline float __half2float(__half x) { return embedfuse::to_float(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return embedfuse::to_float(x); }
inline __half __float2half_rn(float x) {
  __half y;
  return embedfuse::from_float(x, &y), y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 y;
  return embedfuse::from_float(x, &y), y;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  const char* const texts[] = {"no error", "invalid argument", "invalid configuration argument"};
  return texts[error];
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > emulated::kSharedBytesOptIn) return cudaErrorInvalidValue;
  emulated::opted_in[(const void*)kernel] = bytes;
  return cudaSuccess;
}
