// The kernels for AVX-512.
#include "cpu/isa.h"

#if defined(__x86_64__)
  #define EMBEDFUSE_ISA EMBEDFUSE_AVX512
EMBEDFUSE_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

namespace embedfuse::avx512 {
  #include "cpu/kernels.h"
}  // namespace embedfuse::avx512

EMBEDFUSE_END_TARGET
#endif
