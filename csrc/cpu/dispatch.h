// The kernels of one instruction set, as a table. Chosen once, when Python loads the module.
#pragma once
#include <string>
#include <vector>

#include "embedfuse/args.h"

namespace embedfuse {

struct CpuKernels {
  void (*pool_normalize)(const PoolNormalizeArgs&, float* scratch);
  void (*linear_few_rows)(const LinearArgs&);
  int64_t (*linear_scratch)(const LinearArgs&);
  void (*linear)(const LinearArgs&, float* scratch);
  void (*token_weights)(const TokenWeightsArgs&);
  void (*varlen_attention)(const VarlenAttentionArgs&);
  void (*add_layer_norm)(const AddLayerNormArgs&);
  int64_t (*maxsim_scratch)(const MaxSimArgs&);
  void (*maxsim)(const MaxSimArgs&, float* scratch);
  void (*segment_sum)(const SegmentSumArgs&);
  void (*add_rms_norm)(const AddRmsNormArgs&);
  void (*rope)(const RopeArgs&);
  void (*silu_mul)(const SiluMulArgs&);
  void (*info_nce_update)(const InfoNceTile&, const InfoNceState&);
  void (*info_nce_gradient)(const InfoNceTile&, const InfoNceGradient&);
};

// ISAs that this build has and this processor runs, best first.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument for a name that supported_isas() does not list.
void select_isa(const std::string& name);
// Name of the ISA whose kernels cpu_kernels() gives.
std::string selected_isa();
const CpuKernels& cpu_kernels();

}  // namespace embedfuse
