// The kernels for AVX-512 with bf16 and VNNI, and those for AMX, which extend them.
#include "cpu/isa.h"

#if defined(__x86_64__)
  #define EMBEDFUSE_ISA EMBEDFUSE_AVX512_BF16
EMBEDFUSE_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,f16c")

namespace embedfuse::avx512_bf16 {
  #include "cpu/kernels.h"
}  // namespace embedfuse::avx512_bf16

  #if defined(EMBEDFUSE_HAS_AMX)
namespace embedfuse::amx {
using namespace avx512_bf16;
    #include "cpu/maxsim_amx.h"
}  // namespace embedfuse::amx
  #endif

EMBEDFUSE_END_TARGET
#endif
