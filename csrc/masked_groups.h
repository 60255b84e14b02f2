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

void masked_groups(const MaskedGroups& args);         // output of input, weight, bias
void masked_groups_input(const MaskedGroups& args);   // dinput of doutput, weight
void masked_groups_weight(const MaskedGroups& args);  // dweight, dbias of doutput, input

}  // namespace cpd
