// Grouped convolution with few channels a group: live channels of full-width or compact tensors through index lists,
// and its gradients.
#pragma once
#include <cstdint>

#include "channel_kl.h"  // Dtype

namespace cpd {

// The live channels on one side of the groups, in order. Group g owns live channels starts[g] to starts[g + 1] and the
// places held[g] to held[g + 1] of the tensor. Live channel i is at place at[i] there, and is row (outputs) or column
// (inputs) index[i] of the weight. slot[place] is the live channel there, or -1: results are zero at such places.
struct LiveChannels {
  const int64_t *starts, *held, *at, *index, *slot;
  int64_t num_live, num_held;
};

// Images are contiguous (N, C, H, W), or with the channels last. The weight has rows of weight_row values, columns
// column_step apart and taps tap_step apart (row-major over the kernel). CUDA: all pointers are on the device.
struct MaskedGroups {
  Dtype dtype;
  bool channels_last;
  const void *input, *weight, *bias, *doutput;  // bias may be null
  void *output, *dinput, *dweight, *dbias;      // dbias may be null: not wanted
  LiveChannels inputs, outputs;
  int64_t groups, weight_rows, weight_row, column_step, tap_step;
  int64_t n, input_h, input_w, output_h, output_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int num_threads;
};

// Pointers input to dbias, the lists of inputs and then of outputs one after another, and dtype, channels_last, groups,
// live and held of inputs, of outputs, weight_rows to dilation_w: what cpd_fast/ops/_direct.py makes.
inline MaskedGroups masked_groups_of(void* const* p, const int64_t* table, const int64_t* s, int num_threads) {
  const auto side = [&](int64_t live, int64_t held) {
    const int64_t* starts = table;
    const int64_t* places = starts + s[2] + 1;
    const int64_t* at = places + s[2] + 1;
    table = at + 2 * live + held;
    return LiveChannels{starts, places, at, at + live, at + 2 * live, live, held};
  };
  const LiveChannels inputs = side(s[3], s[4]), outputs = side(s[5], s[6]);
  return {Dtype(s[0]), s[1] != 0, p[0],  p[1],  p[2],  p[3],  p[4],  p[5],  p[6],       p[7],  inputs,
          outputs,     s[2],      s[7],  s[8],  s[9],  s[10], s[11], s[12], s[13],      s[14], s[15],
          s[16],       s[17],     s[18], s[19], s[20], s[21], s[22], s[23], num_threads};
}

void masked_groups(const MaskedGroups& args);         // output of input, weight, bias
void masked_groups_input(const MaskedGroups& args);   // dinput of doutput, weight
void masked_groups_weight(const MaskedGroups& args);  // dweight, dbias of doutput, input

void masked_groups_cuda(const MaskedGroups& args, void* stream);
void masked_groups_input_cuda(const MaskedGroups& args, void* stream);
void masked_groups_weight_cuda(const MaskedGroups& args, void* scratch, void* stream);
int64_t masked_groups_weight_cuda_scratch(const MaskedGroups& args);  // bytes

}  // namespace cpd
