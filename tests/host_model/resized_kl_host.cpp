// The CUDA bodies of resized_kl behind a C interface, for tests/ops/test_cuda_resized.py.
#include <vector>

#include "../../csrc/cuda/resized_kl.cu"
#include "cases.h"
#include "guarded.h"

// sizes: n, c, student h and w, teacher h and w.
extern "C" const char* resized_kl(int dtype, const void* student, const void* teacher, const void* weight,
                                  const void* grad, void* loss, void* dstudent, const int64_t* sizes, int over_classes,
                                  int align_corners, double inv_temperature, double loss_scale, double grad_scale) {
  return host_model::guarded([&] {
    cpd::ResizedKl args{
        cpd::Dtype(dtype),  student,         teacher,    weight,     grad,     loss,     dstudent,
        sizes[0],           sizes[1],        sizes[2],   sizes[3],   sizes[4], sizes[5], over_classes != 0,
        align_corners != 0, inv_temperature, loss_scale, grad_scale, 1};
    // Exactly as long as asked for, and NaN to begin with.
    std::vector<char> scratch(size_t(cpd::resized_kl_cuda_scratch(args)), char(0xff));
    args.scratch = scratch.data();
    cpd::resized_kl_cuda(args, nullptr);
  });
}

namespace {

template <class T, class A>
void resized(int dtype, std::vector<int64_t> sizes, bool over_classes, bool align_corners) {
  const size_t maps = size_t(sizes[0] * sizes[1]);
  const size_t pixels = size_t(std::max(sizes[2], sizes[4]) * std::max(sizes[3], sizes[5]));
  const size_t distributions = over_classes ? size_t(sizes[0]) * pixels : maps;
  std::vector<T> student(maps * size_t(sizes[2] * sizes[3])), dstudent(student.size());
  std::vector<T> teacher(maps * size_t(sizes[4] * sizes[5]));
  for (size_t i = 0; i < student.size(); ++i) student[i] = T(i * 37 % 11);
  for (size_t i = 0; i < teacher.size(); ++i) teacher[i] = T(i * 53 % 13);
  std::vector<A> weight(size_t(sizes[0]) * pixels), grad(distributions, 1), loss(distributions);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = A(i % 3);
  host_model::stop_on(resized_kl(dtype, student.data(), teacher.data(), weight.data(), grad.data(), loss.data(),
                                 dstudent.data(), sizes.data(), over_classes, align_corners, 0.5, 4, 2));
}

}  // namespace

CASE(student_smaller) {
  resized<float, float>(0, {1, 2, 3, 4, 7, 9}, false, false);
  resized<float, float>(0, {1, 2, 3, 4, 7, 9}, true, true);
  resized<uint16_t, float>(2, {1, 1, 1, 1, 3, 2}, false, true);
}
CASE(teacher_smaller) {
  resized<double, double>(1, {1, 2, 7, 9, 3, 9}, false, false);
  resized<uint16_t, float>(3, {2, 2, 7, 9, 1, 4}, true, false);
}
CASE(several_chunks) {
  resized<float, float>(0, {1, 1, 91, 91, 91, 91}, false, false);
}
