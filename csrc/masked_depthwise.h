// Depthwise convolution of the live channels of full-width tensors, and its gradients.
#pragma once
#include <cstdint>

#include "channel_kl.h"  // Dtype

namespace cpd {

// Planes are contiguous (N, C, H, W). Live channel i is plane input_at[i] of an image of the input, output_at[i] of one
// of the output, weight_at[i] of weight and bias; lists have num_live entries. Every plane of the result (output,
// dinput, dweight and dbias) that no live channel names is written as zeros. weight is (., kernel_h, kernel_w).
struct MaskedDepthwise {
  Dtype dtype;
  const void* input;
  const void* weight;
  const void* bias;     // null: none
  const void* doutput;  // of the gradients
  void* output;
  void* dinput;
  void* dweight;
  void* dbias;  // null: not wanted
  const int64_t *input_at, *output_at, *weight_at;
  int64_t num_live;
  int64_t n, input_channels, output_channels, weight_channels;
  int64_t input_h, input_w, output_h, output_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int num_threads;
};

void masked_depthwise(const MaskedDepthwise& args);         // output of input, weight, bias
void masked_depthwise_input(const MaskedDepthwise& args);   // dinput of doutput, weight
void masked_depthwise_weight(const MaskedDepthwise& args);  // dweight, dbias of doutput, input

}  // namespace cpd
