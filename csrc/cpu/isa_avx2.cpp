// The kernels for AVX2.
#include "cpu/isa.h"

#if defined(__x86_64__)
  #define EMBEDFUSE_ISA EMBEDFUSE_AVX2
EMBEDFUSE_BEGIN_TARGET("avx2,fma,f16c")

namespace embedfuse::avx2 {
  #include "cpu/kernels.h"
}  // namespace embedfuse::avx2

EMBEDFUSE_END_TARGET
#endif
