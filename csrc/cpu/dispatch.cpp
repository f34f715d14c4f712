// Compiles every kernel body once per instruction set and picks one table at run time.
//
// Each ISA has its own namespace and target pragma. The bodies use no standard library: an inline
// template compiled for AVX-512 could be the copy that the linker keeps for the baseline.
#include "cpu/dispatch.h"

#include <stdexcept>

#include "cpu/pool_normalize_common.h"
#include "embedfuse/dtype.h"
#include "embedfuse/parallel.h"

#if defined(__x86_64__)
  #include <immintrin.h>
  // Linux gives a process its tiles when asked. Compilers with this header come with an assembler that knows them.
  #if defined(__linux__) && __has_include(<amxtileintrin.h>)
    #include <cpuid.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #define EMBEDFUSE_HAS_AMX
  #endif
#endif

#define EMBEDFUSE_BASELINE 0
#define EMBEDFUSE_AVX2 1
#define EMBEDFUSE_AVX512 2
#define EMBEDFUSE_AVX512_BF16 3

namespace embedfuse {

ThreadPool thread_pool;

#define EMBEDFUSE_ISA EMBEDFUSE_BASELINE
namespace baseline {
#include "cpu/kernels.h"
}
#undef EMBEDFUSE_ISA

#if defined(__x86_64__)
  #define EMBEDFUSE_ISA EMBEDFUSE_AVX2
  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
  #else
    #pragma GCC push_options
    #pragma GCC target("avx2,fma,f16c")
  #endif
namespace avx2 {
  #include "cpu/kernels.h"
}
  #if defined(__clang__)
    #pragma clang attribute pop
  #else
    #pragma GCC pop_options
  #endif
  #undef EMBEDFUSE_ISA

  #define EMBEDFUSE_ISA EMBEDFUSE_AVX512
  #if defined(__clang__)
    #pragma clang attribute push(                                               \
        __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), \
        apply_to = function)
  #else
    #pragma GCC push_options
    #pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
  #endif
namespace avx512 {
  #include "cpu/kernels.h"
}
  #if defined(__clang__)
    #pragma clang attribute pop
  #else
    #pragma GCC pop_options
  #endif
  #undef EMBEDFUSE_ISA

  #define EMBEDFUSE_ISA EMBEDFUSE_AVX512_BF16
  #if defined(__clang__)
    #pragma clang attribute push(                                                          \
        __attribute__((                                                                    \
            target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,f16c"))), \
        apply_to = function)
  #else
    #pragma GCC push_options
    #pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,f16c")
  #endif
namespace avx512_bf16 {
  #include "cpu/kernels.h"
}
  #if defined(EMBEDFUSE_HAS_AMX)
namespace amx {
using namespace avx512_bf16;
    #include "cpu/maxsim_amx.h"
}  // namespace amx
  #endif
  #if defined(__clang__)
    #pragma clang attribute pop
  #else
    #pragma GCC pop_options
  #endif
  #undef EMBEDFUSE_ISA
#endif

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const CpuKernels& kernels;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Every processor with bf16 has had VNNI too; kernels of this entry use both.
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(EMBEDFUSE_EMULATE_AMX)
bool has_amx() { return has_avx512_bf16(); }
#elif defined(EMBEDFUSE_HAS_AMX)
// Whether the processor has tiles of bf16 and bytes and the system gives them to this process; it is asked once.
bool has_amx() {
  static const bool given = [] {
    constexpr unsigned kBf16 = 1 << 22, kTile = 1 << 24, kInt8 = 1 << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    unsigned eax, ebx, ecx, edx = 0;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
           !(~edx & (kBf16 | kTile | kInt8)) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return given;
}
#endif

// Best first. A further ISA is one entry here, one block above and one Vec or tile type.
const Isa kIsas[] = {
#if defined(EMBEDFUSE_HAS_AMX)
    {"amx", has_amx, amx::kKernels},
#endif
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::kKernels},
    {"avx512", has_avx512, avx512::kKernels},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::kKernels},
#endif
    {"baseline", [] { return true; }, baseline::kKernels},
};

const Isa* selected = nullptr;

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.push_back(isa.name);
  }
  return names;
}

void select_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.supported()) {
      selected = &isa;
      return;
    }
  }
  throw std::invalid_argument("no such instruction set on this processor: " + name);
}

std::string selected_isa() {
  cpu_kernels();
  return selected->name;
}

const CpuKernels& cpu_kernels() {
  if (!selected) select_isa(supported_isas().front());
  return selected->kernels;
}

}  // namespace embedfuse
