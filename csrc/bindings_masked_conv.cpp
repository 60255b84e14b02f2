// The bindings of csrc/masked_depthwise.h: addresses, index lists and sizes in, as cpd_fast/ops/_depthwise.py makes
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "masked_depthwise.h"

namespace py = pybind11;

namespace {

using Lists = std::array<std::vector<int64_t>, 3>;  // where live channels are: input, output, weight
using Sizes = std::array<int64_t, 16>;              // n to dilation_w of MaskedDepthwise, in its order

// What Python has checked already; here only what would read wild memory.
cpd::MaskedDepthwise depthwise_args(int dtype, const Lists& lists, const Sizes& s, int num_threads) {
  const auto require = [](bool is_right, const char* what) {
    if (!is_right) throw std::invalid_argument(std::string("masked_depthwise: ") + what);
  };
  require(0 <= dtype && dtype <= 3, "dtype must be 0 to 3");
  require(num_threads >= 1, "num_threads must be >= 1");
  for (size_t i = 0; i < 3; ++i) {
    require(lists[i].size() == lists[0].size(), "index lists must be of one length");
    const int64_t channels = s[1 + i];
    const auto is_inside = [&](int64_t c) { return 0 <= c && c < channels; };
    require(std::all_of(lists[i].begin(), lists[i].end(), is_inside), "an index is out of range");
  }
  for (size_t i = 4; i < 12; ++i) require(s[i] >= 1, "spatial sizes, kernel and stride must be >= 1");
  for (size_t d = 0; d < 2; ++d) {
    const int64_t in = s[4 + d], out = s[6 + d], kernel = s[8 + d], stride = s[10 + d], padding = s[12 + d];
    require(padding >= 0 && s[14 + d] >= 1, "padding must be >= 0, dilation >= 1");
    require((out - 1) * stride + (kernel - 1) * s[14 + d] + 1 <= in + 2 * padding, "the output is too large");
  }
  cpd::MaskedDepthwise args{};
  args.dtype = cpd::Dtype(dtype);
  args.input_at = lists[0].data();
  args.output_at = lists[1].data();
  args.weight_at = lists[2].data();
  args.num_live = int64_t(lists[0].size());
  int64_t* const fields[] = {&args.n,         &args.input_channels, &args.output_channels, &args.weight_channels,
                             &args.input_h,   &args.input_w,        &args.output_h,        &args.output_w,
                             &args.kernel_h,  &args.kernel_w,       &args.stride_h,        &args.stride_w,
                             &args.padding_h, &args.padding_w,      &args.dilation_h,      &args.dilation_w};
  for (size_t i = 0; i < s.size(); ++i) *fields[i] = s[i];
  args.num_threads = num_threads;
  return args;
}

const void* in(uintptr_t p) {
  return reinterpret_cast<const void*>(p);
}
void* out(uintptr_t p) {
  return reinterpret_cast<void*>(p);
}

void all_there(std::initializer_list<uintptr_t> pointers) {
  for (const uintptr_t p : pointers) {
    if (!p) throw std::invalid_argument("masked_depthwise: pointers must not be null");
  }
}

void forward(int dtype, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output, const Lists& lists,
             const Sizes& sizes, int num_threads) {
  auto args = depthwise_args(dtype, lists, sizes, num_threads);
  all_there({input, weight, output});
  args.input = in(input);
  args.weight = in(weight);
  args.bias = in(bias);
  args.output = out(output);
  cpd::masked_depthwise(args);
}

void backward_input(int dtype, uintptr_t doutput, uintptr_t weight, uintptr_t dinput, const Lists& lists,
                    const Sizes& sizes, int num_threads) {
  auto args = depthwise_args(dtype, lists, sizes, num_threads);
  all_there({doutput, weight, dinput});
  args.doutput = in(doutput);
  args.weight = in(weight);
  args.dinput = out(dinput);
  cpd::masked_depthwise_input(args);
}

void backward_weight(int dtype, uintptr_t doutput, uintptr_t input, uintptr_t dweight, uintptr_t dbias,
                     const Lists& lists, const Sizes& sizes, int num_threads) {
  auto args = depthwise_args(dtype, lists, sizes, num_threads);
  all_there({doutput, input, dweight});
  args.doutput = in(doutput);
  args.input = in(input);
  args.dweight = out(dweight);
  args.dbias = out(dbias);
  cpd::masked_depthwise_weight(args);
}

}  // namespace

void bind_masked_conv(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("masked_depthwise", &forward, no_gil);
  m.def("masked_depthwise_input", &backward_input, no_gil);
  m.def("masked_depthwise_weight", &backward_weight, no_gil);
}
