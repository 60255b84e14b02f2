// A small model of CUDA's execution, so that kernel bodies run on a CPU: each thread of a block is a fiber that runs
// until a barrier or a warp collective. Blocks run one after another; which thread runs next is the test's choice
// (forward, reverse or random order), so that two threads that meet in memory without a barrier between them give
// different results. Under ThreadSanitizer, fibers and barriers are announced to it, and it reports such threads.
//
// Stricter than a GPU: threads at different lines of a barrier, a returned thread that others wait for, and a lane
// outside its own mask are errors. Looser: fences do nothing, and atomics are acquire-release.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CPD_HOST_MODEL__ 1

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- types ----

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

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

// ---- arithmetic ----

inline unsigned __umulhi(unsigned x, unsigned y) {
  return unsigned(uint64_t(x) * y >> 32);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(unsigned(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __float_as_int(float x) {
  int i;
  std::memcpy(&i, &x, 4);
  return i;
}
inline float __int_as_float(int i) {
  float x;
  std::memcpy(&x, &i, 4);
  return x;
}
inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}

// ---- barriers, warps, shared memory ----

namespace host_model {

enum Order { kForward = 0, kReverse = 1, kRandom = 2 };
void set_order(int order, unsigned seed);
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

struct Place {
  const char* file;
  int line;
};
void barrier(Place place);
void warp_barrier(unsigned mask, Place place);
// Every lane of the mask gives 8 bytes and gets all of them: 32 values, all bits set where a lane is not of the mask.
// They stand until the lane's next but one collective.
const uint64_t* exchange(unsigned mask, uint64_t value, Place place);
int lane();
// One array a block, of exactly this length, filled with NaN when the block starts.
void* shared_array(const void* tag, size_t bytes);
void* dynamic_shared();

template <class T>
T from_lane(unsigned mask, T value, int from, Place place) {
  static_assert(sizeof(T) <= 8, "shuffles move 8 bytes at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, place)[from];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace host_model

#define SHARED(type, name, count) \
  static char name##_tag;         \
  type(&name)[count] = *static_cast<type(*)[count]>(host_model::shared_array(&name##_tag, sizeof(type[count])))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(host_model::dynamic_shared())

// Where a modelled function was called.
#define HM_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HM_CALLER) {
  host_model::barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, HM_CALLER) {
  host_model::warp_barrier(mask, {file, line});
}

// Shuffles move values and order no memory. A lane whose source lies outside its segment keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, HM_CALLER) {
  const int self = host_model::lane(), segment = self / width * width;
  return host_model::from_lane(mask, value, segment + from % width, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, HM_CALLER) {
  const int self = host_model::lane(), end = self / width * width + width;
  return host_model::from_lane(mask, value, self + int(by) < end ? self + int(by) : self, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, HM_CALLER) {
  const int self = host_model::lane(), begin = self / width * width;
  return host_model::from_lane(mask, value, self - int(by) >= begin ? self - int(by) : self, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, HM_CALLER) {
  const int self = host_model::lane(), from = self ^ by;
  return host_model::from_lane(mask, value, from / width == self / width ? from : self, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, HM_CALLER) {
  const uint64_t* votes = host_model::exchange(mask, predicate != 0, {file, line});
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= mask >> i & 1 && votes[i] ? 1u << i : 0;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, HM_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HM_CALLER) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

// ---- atomics: on integers only; a sum of floats would depend on the order ----

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T atomicAdd(T* p, T x) {
  static_assert(std::is_integral<T>::value, "no float atomics: the same bits from run to run");
  return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
}
template <class T>
T atomicOr(T* p, T x) {
  return __atomic_fetch_or(p, x, __ATOMIC_ACQ_REL);
}
template <class T>
T atomicExch(T* p, T x) {
  return __atomic_exchange_n(p, x, __ATOMIC_ACQ_REL);
}
template <class T>
T atomicCAS(T* p, T expected, T x) {
  __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
template <class T>
T atomicMax(T* p, T x) {
  static_assert(std::is_integral<T>::value, "no float atomics");
  T old = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return old;
}
template <class T>
T atomicMin(T* p, T x) {
  static_assert(std::is_integral<T>::value, "no float atomics");
  T old = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (x < old && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return old;
}

namespace cpd {

template <class... Params, class... Args>
void launch_shared(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void*, Args... args) {
  const std::tuple<Params...> kept(args...);
  host_model::run(grid, block, shared_bytes, [&] { std::apply(kernel, kept); });
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
  launch_shared(kernel, grid, block, 0, stream, args...);
}

}  // namespace cpd
