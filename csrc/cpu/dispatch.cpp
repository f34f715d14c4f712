// Selects the kernels of one instruction set at run time; they are compiled in isa_*.cpp.
#include "cpu/dispatch.h"

#include <stdexcept>

#include "embedfuse/parallel.h"

#if defined(EMBEDFUSE_HAS_AMX)
  #include <cpuid.h>
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

namespace embedfuse {

ThreadPool thread_pool;

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
// Whether the processor has tiles for bf16 and bytes and the system enables them for this process; asked once.
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

// Best first. A new ISA needs an entry here, a function above, and a Vec or tile type.
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
