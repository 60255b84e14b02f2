// cpd_fast._native: raw pointers, sizes and a stream number in; cpd_fast/ops/_dispatch.py and _probe_kernels.py are the
// only callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "channel_kl.h"
#include "dispatch.h"

namespace py = pybind11;

void bind_elements(py::module_& m);    // bindings_elements.cpp
void bind_hutchinson(py::module_& m);  // bindings_hutchinson.cpp
void bind_masked_conv(py::module_& m);
void bind_masked_groups(py::module_& m);  // bindings_masked_conv.cpp

namespace {

const void* in(uintptr_t p) {
  return reinterpret_cast<const void*>(p);
}
void* out(uintptr_t p) {
  return reinterpret_cast<void*>(p);
}

// What Python has checked already; here only what would read wild memory.
void check(const char* op, int dtype, int64_t outer, int64_t reduce, int64_t inner, int threads) {
  const auto fail = [&](const std::string& what) { throw std::invalid_argument(std::string(op) + ": " + what); };
  if (dtype < 0 || dtype > 3) fail("dtype must be 0 to 3, got " + std::to_string(dtype));
  if (outer < 0 || reduce < 1 || inner < 1) fail("outer must be >= 0, reduce and inner >= 1");
  if (threads < 1) fail("num_threads must be >= 1, got " + std::to_string(threads));
}

void channel_kl(int dtype, uintptr_t student, uintptr_t teacher, uintptr_t grad, uintptr_t loss, uintptr_t dstudent,
                int64_t outer, int64_t reduce, int64_t inner, double inv_temperature, double loss_scale,
                double grad_scale, int num_threads) {
  check("channel_kl", dtype, outer, reduce, inner, num_threads);
  if (outer == 0) return;
  if (!student || !teacher) throw std::invalid_argument("channel_kl: student and teacher must not be null");
  cpd::channel_kl({cpd::Dtype(dtype), in(student), in(teacher), in(grad), out(loss), out(dstudent), outer, reduce,
                   inner, inv_temperature, loss_scale, grad_scale, num_threads});
}

void scale_rows(int dtype, uintptr_t grad, uintptr_t dstudent, int64_t outer, int64_t reduce, int64_t inner,
                int num_threads) {
  check("scale_rows", dtype, outer, reduce, inner, num_threads);
  if (dtype > 1) throw std::invalid_argument("scale_rows: fp32 or fp64 only");
  if (outer == 0) return;
  if (!grad || !dstudent) throw std::invalid_argument("scale_rows: grad and dstudent must not be null");
  cpd::scale_rows({cpd::Dtype(dtype), in(grad), out(dstudent), outer, reduce, inner, num_threads});
}

cpd::ResizedKl resized_args(const char* op, int dtype, uintptr_t student, uintptr_t teacher, uintptr_t weight,
                            uintptr_t grad, uintptr_t loss, uintptr_t dstudent, int64_t n, int64_t c, int64_t student_h,
                            int64_t student_w, int64_t teacher_h, int64_t teacher_w, bool over_classes,
                            bool align_corners, double inv_temperature, double loss_scale, double grad_scale,
                            int num_threads) {
  const auto fail = [&](const char* what) { throw std::invalid_argument(std::string(op) + ": " + what); };
  check(op, dtype, n, c, std::min({student_h, student_w, teacher_h, teacher_w}), num_threads);
  if ((student_h < teacher_h && student_w > teacher_w) || (student_h > teacher_h && student_w < teacher_w)) {
    fail("one map must be at least as high and as wide as the other");
  }
  if (n > 0 && (!student || !teacher)) fail("student and teacher must not be null");
  return {cpd::Dtype(dtype),
          in(student),
          in(teacher),
          in(weight),
          in(grad),
          out(loss),
          out(dstudent),
          n,
          c,
          student_h,
          student_w,
          teacher_h,
          teacher_w,
          over_classes,
          align_corners,
          inv_temperature,
          loss_scale,
          grad_scale,
          num_threads};
}

void resized_kl(int dtype, uintptr_t student, uintptr_t teacher, uintptr_t weight, uintptr_t grad, uintptr_t loss,
                uintptr_t dstudent, int64_t n, int64_t c, int64_t student_h, int64_t student_w, int64_t teacher_h,
                int64_t teacher_w, bool over_classes, bool align_corners, double inv_temperature, double loss_scale,
                double grad_scale, int num_threads) {
  const auto args = resized_args("resized_kl", dtype, student, teacher, weight, grad, loss, dstudent, n, c, student_h,
                                 student_w, teacher_h, teacher_w, over_classes, align_corners, inv_temperature,
                                 loss_scale, grad_scale, num_threads);
  if (n > 0) cpd::resized_kl(args);
}

#ifdef CPD_WITH_CUDA
void channel_kl_cuda(int dtype, uintptr_t student, uintptr_t teacher, uintptr_t grad, uintptr_t loss,
                     uintptr_t dstudent, uintptr_t scratch, int64_t outer, int64_t reduce, int64_t inner,
                     double inv_temperature, double loss_scale, double grad_scale, uintptr_t stream) {
  check("channel_kl_cuda", dtype, outer, reduce, inner, 1);
  if (outer == 0) return;
  if (!student || !teacher) throw std::invalid_argument("channel_kl_cuda: student and teacher must not be null");
  cpd::channel_kl_cuda({cpd::Dtype(dtype), in(student), in(teacher), in(grad), out(loss), out(dstudent), outer, reduce,
                        inner, inv_temperature, loss_scale, grad_scale, 1, out(scratch)},
                       out(stream));
}

void scale_rows_cuda(int dtype, uintptr_t grad, uintptr_t dstudent, int64_t outer, int64_t reduce, int64_t inner,
                     uintptr_t stream) {
  check("scale_rows_cuda", dtype, outer, reduce, inner, 1);
  if (dtype > 1) throw std::invalid_argument("scale_rows_cuda: fp32 or fp64 only");
  if (outer == 0) return;
  if (!grad || !dstudent) throw std::invalid_argument("scale_rows_cuda: grad and dstudent must not be null");
  cpd::scale_rows_cuda({cpd::Dtype(dtype), in(grad), out(dstudent), outer, reduce, inner, 1}, out(stream));
}

void resized_kl_cuda(int dtype, uintptr_t student, uintptr_t teacher, uintptr_t weight, uintptr_t grad, uintptr_t loss,
                     uintptr_t dstudent, uintptr_t scratch, int64_t n, int64_t c, int64_t student_h, int64_t student_w,
                     int64_t teacher_h, int64_t teacher_w, bool over_classes, bool align_corners,
                     double inv_temperature, double loss_scale, double grad_scale, uintptr_t stream) {
  auto args =
      resized_args("resized_kl_cuda", dtype, student, teacher, weight, grad, loss, dstudent, n, c, student_h, student_w,
                   teacher_h, teacher_w, over_classes, align_corners, inv_temperature, loss_scale, grad_scale, 1);
  args.scratch = out(scratch);
  if (n > 0) cpd::resized_kl_cuda(args, out(stream));
}

int64_t resized_kl_cuda_scratch(int dtype, int64_t n, int64_t c, int64_t student_h, int64_t student_w,
                                int64_t teacher_h, int64_t teacher_w, bool over_classes) {
  return cpd::resized_kl_cuda_scratch(resized_args("resized_kl_cuda_scratch", dtype, 1, 1, 0, 0, 0, 0, n, c, student_h,
                                                   student_w, teacher_h, teacher_w, over_classes, false, 1, 1, 1, 1));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of cpd_fast on raw pointers.";
#ifdef CPD_WITH_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_archs") = CPD_ARCHS_TEXT;
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_archs") = "";
#endif
  m.def("supported_isas", &cpd::supported_isas);
  m.def("current_isa", &cpd::current_isa);
  m.def("set_isa", &cpd::set_isa, py::arg("name"));
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("channel_kl", &channel_kl, no_gil);
  m.def("scale_rows", &scale_rows, no_gil);
  m.def("resized_kl", &resized_kl, no_gil);
  bind_hutchinson(m);
  bind_masked_conv(m);
  bind_masked_groups(m);
  bind_elements(m);
#ifdef CPD_WITH_CUDA
  m.def("channel_kl_cuda", &channel_kl_cuda, no_gil);
  m.def("channel_kl_cuda_scratch", [](int dtype, int64_t outer, int64_t reduce, int64_t inner) {
    return cpd::channel_kl_cuda_scratch(cpd::Dtype(dtype), outer, reduce, inner);
  });
  m.def("scale_rows_cuda", &scale_rows_cuda, no_gil);
  m.def("resized_kl_cuda", &resized_kl_cuda, no_gil);
  m.def("resized_kl_cuda_scratch", &resized_kl_cuda_scratch);
#endif
}
