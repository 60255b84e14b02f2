// The CUDA bodies of masked_groups behind a C interface, for tests/ops/test_masked_groups_bodies.py.
#include <vector>

#include "../../csrc/cuda/masked_groups.cu"
#include "cases.h"
#include "guarded.h"

// which: values, gradients of inputs, gradients of weights.
extern "C" const char* masked_groups(int which, void* const* pointers, const int64_t* table, const int64_t* numbers) {
  return host_model::guarded([&] {
    const auto args = cpd::masked_groups_of(pointers, table, numbers, 1);
    if (which == 0) return cpd::masked_groups_cuda(args, nullptr);
    if (which == 1) return cpd::masked_groups_input_cuda(args, nullptr);
    // Exactly as long as asked for, and NaN to begin with.
    std::vector<char> scratch(size_t(cpd::masked_groups_weight_cuda_scratch(args)), char(0xff));
    cpd::masked_groups_weight_cuda(args, scratch.data(), nullptr);
  });
}

// Where a value lies, for tensors that do not fit.
extern "C" int64_t masked_groups_offset(int last, int64_t places, int64_t pixels, int64_t n, int64_t place,
                                        int64_t pixel) {
  return cpd::Images{places, pixels, 1, int(pixels), last != 0}.offset(n, place, pixel);
}

namespace {

// Two groups of two, one input of the first dead; 3 x 3, stride 2.
template <class T>
void small(int64_t dtype, bool last) {
  const std::vector<int64_t> table{0, 1, 3, 0, 2, 4, 0, 2, 3, 0, 0, 1, 0, -1, 1, 2,         // inputs
                                   0, 2, 4, 0, 2, 4, 0, 1, 2, 3, 0, 1, 2, 3,  0, 1, 2, 3};  // outputs
  const std::vector<int64_t> numbers{dtype, last, 2, 3, 4, 4, 4, 4, 2 * 9, 9, 1, 2, 5, 7, 3, 4, 3, 3, 2, 2, 1, 1, 1, 1};
  std::vector<T> x(2 * 4 * 5 * 7), weight(4 * 2 * 9), bias(4), dy(2 * 4 * 3 * 4), y(dy.size()), dx(x.size());
  std::vector<T> dw(weight.size()), db(4);
  for (size_t i = 0; i < x.size(); ++i) x[i] = T(i * 37 % 11);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = T(i * 53 % 13);
  for (size_t i = 0; i < dy.size(); ++i) dy[i] = T(i * 29 % 7);
  void* const pointers[] = {x.data(), weight.data(), bias.data(), dy.data(), y.data(), dx.data(), dw.data(), db.data()};
  for (int which = 0; which < 3; ++which) {
    host_model::stop_on(masked_groups(which, pointers, table.data(), numbers.data()));
  }
}

}  // namespace

CASE(groups_nchw) {
  small<float>(0, false);
  small<double>(1, false);
}
CASE(groups_channels_last) {
  small<float>(0, true);
  small<uint16_t>(2, true);
}
