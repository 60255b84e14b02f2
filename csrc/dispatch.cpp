// Runtime choice among the bodies that CMake compiled once per instruction set.
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "channel_kl.h"
#include "elements.h"
#include "hutchinson.h"
#include "masked_depthwise.h"
#include "masked_groups.h"

// Each op names its bodies once here; a new op adds one line to each of the two lists.
#define CPD_FOR_EACH_OP(X)                    \
  X(channel_kl, ChannelKl)                    \
  X(scale_rows, ScaleRows)                    \
  X(resized_kl, ResizedKl)                    \
  X(rademacher, Rademacher)                   \
  X(reversible_step, ReversibleStep)          \
  X(small_elements, SmallElements)            \
  X(hutchinson_reduce, HutchinsonReduce)      \
  X(channel_sums, ChannelSums)                \
  X(elements, Elements)                       \
  X(masked_depthwise, MaskedDepthwise)        \
  X(masked_depthwise_input, MaskedDepthwise)  \
  X(masked_depthwise_weight, MaskedDepthwise) \
  X(masked_groups, MaskedGroups) X(masked_groups_input, MaskedGroups) X(masked_groups_weight, MaskedGroups)

namespace cpd {

#define CPD_DECLARE(name, Args) void name(const Args& args);
namespace portable {
CPD_FOR_EACH_OP(CPD_DECLARE)
}
#ifdef CPD_X86
namespace avx2 {
CPD_FOR_EACH_OP(CPD_DECLARE)
}
namespace avx512 {
CPD_FOR_EACH_OP(CPD_DECLARE)
}
#endif

std::vector<std::string> supported_isas() {
  std::vector<std::string> names{"portable"};
#ifdef CPD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) names.push_back("avx2");
  if (avx512) names.push_back("avx512");
#endif
  return names;
}

namespace {

enum Isa { kPortable, kAvx2, kAvx512 };

std::atomic<int>& isa() {
  static std::atomic<int> level{int(supported_isas().size()) - 1};
  return level;
}

}  // namespace

std::string current_isa() {
  return supported_isas()[size_t(isa())];
}

void set_isa(const std::string& name) {
  const auto names = supported_isas();
  const auto at = std::find(names.begin(), names.end(), name);
  if (at == names.end()) throw std::invalid_argument("set_isa: this CPU has no " + name);
  isa() = int(at - names.begin());
}

#ifdef CPD_X86
#define CPD_DEFINE(name, Args)       \
  void name(const Args& args) {      \
    switch (isa()) {                 \
      case kAvx512:                  \
        return avx512::name(args);   \
      case kAvx2:                    \
        return avx2::name(args);     \
      default:                       \
        return portable::name(args); \
    }                                \
  }
#else
#define CPD_DEFINE(name, Args)  \
  void name(const Args& args) { \
    portable::name(args);       \
  }
#endif
CPD_FOR_EACH_OP(CPD_DEFINE)

}  // namespace cpd
