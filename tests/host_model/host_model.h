// A small model of CUDA's execution, so that kernel bodies run on a CPU: each thread of a block is a fiber that runs
// until a barrier or shuffle. Blocks run one after another; which thread runs next is the test's choice (forward,
// reverse or random order), so that two threads that meet in memory without a barrier between them give different
// results.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __CPD_HOST_MODEL__ 1

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct __half {
  _Float16 v;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) {
  return float(x.v);
}
inline __half __float2half_rn(float x) {
  return {static_cast<_Float16>(x)};
}
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return {uint16_t(f != f ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

namespace host_model {

enum Order { kForward = 0, kReverse = 1, kRandom = 2 };
void set_order(int order, unsigned seed);
void run(dim3 grid, dim3 block, const std::function<void()>& thread);
void barrier(int line);
// Every lane of the warp gives 8 bytes and gets those of lane `from`; NaN where that lane is absent.
uint64_t shuffle(uint64_t value, int from, int line);
// One array a block, filled with NaN when the block starts.
void* shared_array(const void* tag, size_t bytes);

}  // namespace host_model

#define SHARED(type, name, count) \
  static char name##_tag;         \
  type(&name)[count] = *static_cast<type(*)[count]>(host_model::shared_array(&name##_tag, sizeof(type[count])))

inline void __syncthreads(int line = __builtin_LINE()) {
  host_model::barrier(line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8, "shuffles move 8 bytes at most");
  if (mask != 0xffffffffu) throw std::logic_error("the model has whole-warp shuffles only");
  const int lane = int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = host_model::shuffle(bits, lane + by < 32 ? lane + by : lane, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

namespace cpd {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, void*, Args... args) {
  const std::tuple<Params...> kept(args...);
  host_model::run(grid, block, [&] { std::apply(kernel, kept); });
}

}  // namespace cpd
