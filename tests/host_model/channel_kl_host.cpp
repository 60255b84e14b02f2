// The CUDA bodies of channel_kl behind a C interface, for tests/ops/test_cuda_bodies.py.
#include <vector>

#include "../../csrc/cuda/channel_kl.cu"
#include "cases.h"
#include "guarded.h"

extern "C" const char* channel_kl(int dtype, const void* student, const void* teacher, const void* grad, void* loss,
                                  void* dstudent, int64_t outer, int64_t reduce, int64_t inner, double inv_temperature,
                                  double loss_scale, double grad_scale) {
  return host_model::guarded([&] {
    // Exactly as long as asked for, and NaN to begin with.
    std::vector<char> scratch(size_t(cpd::channel_kl_cuda_scratch(cpd::Dtype(dtype), outer, reduce, inner)),
                              char(0xff));
    cpd::channel_kl_cuda({cpd::Dtype(dtype), student, teacher, grad, loss, dstudent, outer, reduce, inner,
                          inv_temperature, loss_scale, grad_scale, 1, scratch.data()},
                         nullptr);
  });
}

extern "C" const char* scale_rows(int dtype, const void* grad, void* dstudent, int64_t outer, int64_t reduce,
                                  int64_t inner) {
  return host_model::guarded(
      [&] { cpd::scale_rows_cuda({cpd::Dtype(dtype), grad, dstudent, outer, reduce, inner, 1}, nullptr); });
}

namespace {

// Arrays are as long as they have to be, less `missing` elements of the gradient.
template <class T>
void kl(int dtype, int64_t outer, int64_t reduce, int64_t inner, size_t missing = 0) {
  const size_t all = size_t(outer * reduce * inner), columns = size_t(outer * inner);
  std::vector<T> student(all), teacher(all), dstudent(all - missing);
  for (size_t i = 0; i < all; ++i) {
    student[i] = T(i * 37 % 11);
    teacher[i] = T(i * 53 % 13);
  }
  std::vector<double> grad(columns), loss(columns);  // fp32 uses half of it
  host_model::stop_on(channel_kl(dtype, student.data(), teacher.data(), grad.data(), loss.data(), dstudent.data(),
                                 outer, reduce, inner, 0.5, 4, 2));
}

}  // namespace

CASE(rows) {
  kl<float>(0, 3, 37, 1);
  kl<float>(0, 2, 64, 1);
  kl<uint16_t>(2, 2, 2049, 1);
}
CASE(shared_rows) {
  kl<float>(0, 1, 16387, 1);
  kl<uint16_t>(3, 1, 16387, 1);
  kl<double>(1, 2, 70, 1);
}
CASE(columns) {
  kl<float>(0, 2, 19, 37);
  kl<double>(1, 2, 19, 37);
}
CASE(scale_rows) {
  std::vector<float> grad(2 * 37, 2), dstudent(2 * 7 * 37, 1);
  host_model::stop_on(scale_rows(0, grad.data(), dstudent.data(), 2, 7, 37));
  host_model::stop_on(scale_rows(0, grad.data(), dstudent.data(), 74, 7, 1));
}
FAULT(short_gradient) {
  kl<float>(0, 1, 37, 1, 1);
}
