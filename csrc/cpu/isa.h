// Included by each isa_*.cpp before its kernels: all standard headers, and the target pragma of the kernels.
//
// Each instruction set has its own namespace and target pragma. The kernels use no standard library: an inline
// template compiled for AVX-512 could be the copy that the linker keeps for the baseline.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/pool_normalize_common.h"
#include "embedfuse/dtype.h"
#include "embedfuse/parallel.h"

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#define EMBEDFUSE_BASELINE 0
#define EMBEDFUSE_AVX2 1
#define EMBEDFUSE_AVX512 2
#define EMBEDFUSE_AVX512_BF16 3

#define EMBEDFUSE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
  #define EMBEDFUSE_BEGIN_TARGET(isas) \
    EMBEDFUSE_PRAGMA(clang attribute push(__attribute__((target(isas))), apply_to = function))
  #define EMBEDFUSE_END_TARGET EMBEDFUSE_PRAGMA(clang attribute pop)
#else
  #define EMBEDFUSE_BEGIN_TARGET(isas) \
    EMBEDFUSE_PRAGMA(GCC push_options) EMBEDFUSE_PRAGMA(GCC target(isas))
  #define EMBEDFUSE_END_TARGET EMBEDFUSE_PRAGMA(GCC pop_options)
#endif
