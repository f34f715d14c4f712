// Every CPU kernel body; each isa_*.cpp includes this once (no include guard).
#include "embedfuse/vec.h"

#include "cpu/add_layer_norm.h"
#include "cpu/add_rms_norm.h"
#include "cpu/embed.h"
#include "cpu/gelu.h"
#include "cpu/linear_words.h"

#include "cpu/linear.h"
#include "cpu/linear_few_rows.h"
#include "cpu/pool_normalize.h"
#include "cpu/rope.h"
#include "cpu/segment_sum.h"
#include "cpu/silu_mul.h"
#include "cpu/token_weights.h"
#include "cpu/varlen_attention.h"

#include "cpu/info_nce.h"
#include "cpu/maxsim_tile.h"

#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
  #include "cpu/maxsim_bytes.h"
  #include "cpu/maxsim_screen.h"
#endif

#include "cpu/maxsim.h"

// A constant, because no function compiled for this ISA may run before the processor is known to have it.
constexpr CpuKernels kKernels{
#define KERNEL(name, ...) name,
#include "cpu/kernel_list.h"
#undef KERNEL
};
