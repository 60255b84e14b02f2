// What every .cu includes: CUDA itself under nvcc; under a host compiler a model of it that tests put on the include
// path.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name)                                      \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)

namespace cpd {

// kernel<<<grid, block, shared_bytes, stream>>>(args...), checked.
template <class... Params, class... Args>
void launch_shared(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args... args) {
  const auto check = [](cudaError_t error) {
    if (error) throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError());
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
  launch_shared(kernel, grid, block, 0, stream, args...);
}

}  // namespace cpd
#else
#include "host_model.h"
#endif

namespace cpd {
namespace {

template <class T>
using compute_t = std::conditional_t<std::is_same<T, double>::value, double, float>;

// Grids end at 2^31 - 1 blocks; kernels stride over what is left.
inline unsigned blocks_for(int64_t work) {
  return unsigned(std::min<int64_t>(work, 0x7fffffff));
}

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
