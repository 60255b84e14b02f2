// KL between two softmaxes along one dim, with its gradient: the body of channel_kl and class_kl.
#pragma once
#include <cstdint>

namespace cpd {

enum class Dtype : int { kF32 = 0, kF64 = 1, kF16 = 2, kBF16 = 3 };

// Tensors are (outer, reduce, inner), inner contiguous, reduce strided by inner: inner == 1 is a contiguous row.
// Statistics, loss and grad are (outer, inner), fp64 for fp64 tensors and fp32 for all others.
struct ChannelKl {
  Dtype dtype;
  const void* student;
  const void* teacher;
  const void* grad;  // null: all ones
  void* loss;        // null: not wanted; loss_scale * KL otherwise
  void* dstudent;    // null: not wanted; grad * grad_scale * (softmax(student) - softmax(teacher)) otherwise
  int64_t outer, reduce, inner;
  double inv_temperature;
  double loss_scale;
  double grad_scale;
  int num_threads;
  void* scratch = nullptr;  // CUDA: channel_kl_cuda_scratch() bytes
};

// The same loss with weights for pixels and with maps of two sizes, the smaller read through bilinear interpolation.
// Tensors are contiguous (n, c, h, w), each of its own h, w; one is at least as high and as wide as the other, and
// pixels are its pixels. weight is (n, h, w), of the statistics' type, all >= 0; a pixel of weight 0 is not looked at.
//   pixels:  softmax over pixels, weight multiplies the exponentials; loss and grad (n, c)
//   classes: softmax over classes, weight multiplies the loss; loss and grad (n, h, w)
struct ResizedKl {
  Dtype dtype;
  const void* student;
  const void* teacher;
  const void* weight;  // null: all ones
  const void* grad;    // null: all ones
  void* loss;          // null: not wanted
  void* dstudent;      // null: not wanted; of the student's own size
  int64_t n, c;
  int64_t student_h, student_w, teacher_h, teacher_w;
  bool over_classes;
  bool align_corners;
  double inv_temperature;
  double loss_scale;
  double grad_scale;
  int num_threads;
  void* scratch = nullptr;  // CUDA: resized_kl_cuda_scratch() bytes
};

// dstudent[o, :, i] *= grad[o, i], in place; places where grad is 1 are not touched, where it is 0 they become 0
// whatever they were.
struct ScaleRows {
  Dtype dtype;
  const void* grad;
  void* dstudent;
  int64_t outer, reduce, inner;
  int num_threads;
};

void channel_kl(const ChannelKl& args);
void scale_rows(const ScaleRows& args);
void resized_kl(const ResizedKl& args);

// The same on a GPU: pointers are the device's, stream is a cudaStream_t; num_threads is not used.
int64_t channel_kl_cuda_scratch(Dtype dtype, int64_t outer, int64_t reduce, int64_t inner);
void channel_kl_cuda(const ChannelKl& args, void* stream);
void scale_rows_cuda(const ScaleRows& args, void* stream);
int64_t resized_kl_cuda_scratch(const ResizedKl& args);
void resized_kl_cuda(const ResizedKl& args, void* stream);

}  // namespace cpd
