// What every .cu includes: CUDA itself under nvcc; under a host compiler a model of it that tests put on the include
// path.
#pragma once
#include <cstdint>
#include <stdexcept>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#define SHARED(type, name, count) __shared__ type name[count]

namespace cpd {

// kernel<<<grid, block, 0, stream>>>(args...), checked.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  if (const cudaError_t error = cudaGetLastError()) {
    throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace cpd
#else
#include "host_model.h"
#endif

namespace cpd {
namespace {

// One rounding, whatever the type that is computed in.
__device__ inline float to_compute(float x) {
  return x;
}
__device__ inline double to_compute(double x) {
  return x;
}
__device__ inline float to_compute(__half x) {
  return __half2float(x);
}
__device__ inline float to_compute(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T, class A>
__device__ inline T from_compute(A x) {
  return T(x);
}
template <>
__device__ inline __half from_compute<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_compute<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

// What 16 bytes hold: one load or store instruction.
template <class T>
struct alignas(16) Pack {
  T v[16 / sizeof(T)];
};

}  // namespace
}  // namespace cpd
