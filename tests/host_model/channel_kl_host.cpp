// The CUDA bodies of channel_kl behind a C interface, for tests/ops/test_cuda_bodies.py.
#include <vector>

#include "../../csrc/cuda/channel_kl.cu"

namespace {

// Faults that the model must see, written as kernels are.
__global__ void missing_barrier(float* out) {
  SHARED(float, room, 64);
  room[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = room[63 - threadIdx.x];
}
__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}
__global__ void returned_thread(float* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void past_the_end(float* out) {
  SHARED(float, room, 64);
  room[threadIdx.x] = 0;
  __syncthreads();
  float* p = room;
  out[threadIdx.x] = p[threadIdx.x + 1];
}
__global__ void overflow(float* out) {
  int x = 0x7fffffff - 62;
  x += int(threadIdx.x);
  out[threadIdx.x] = float(x);
}

char message[512];

template <class F>
const char* guarded(F f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), sizeof(message) - 1);
    return message;
  }
}

}  // namespace

extern "C" void set_order(int order, unsigned seed) {
  host_model::set_order(order, seed);
}

extern "C" const char* channel_kl(int dtype, const void* student, const void* teacher, const void* grad, void* loss,
                                  void* dstudent, int64_t outer, int64_t reduce, int64_t inner, double inv_temperature,
                                  double loss_scale, double grad_scale) {
  return guarded([&] {
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
  return guarded([&] { cpd::scale_rows_cuda({cpd::Dtype(dtype), grad, dstudent, outer, reduce, inner, 1}, nullptr); });
}

extern "C" const char* planted(int which, float* out) {
  return guarded([&] {
    void (*const kernels[])(float*) = {missing_barrier, divergent_barrier, returned_thread, past_the_end, overflow};
    const auto kernel = kernels[which];
    cpd::launch(kernel, dim3(1), dim3(64), nullptr, out);
  });
}
