// Kernels with faults that the model and the sanitizers must see, and right ones that they must let pass; for
// tests/host_model/test_host_model.py.
#include <vector>

#include "cases.h"
#include "cuda/device.h"
#include "guarded.h"

namespace {

using cpd::launch;
using cpd::launch_shared;

// ---- seen by the model itself ----

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
__global__ void missing_lane(float* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_down_sync(0xffffffffu, float(threadIdx.x), 1);
}
__global__ void outside_own_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, float(threadIdx.x), 1);
}
__global__ void unset_memory(float* out) {
  SHARED(float, room, 64);
  out[threadIdx.x] = room[threadIdx.x];
}
__global__ void absent_source(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_sync(mask, 1.0f, 0);  // lanes 16 to 31 read lane 0, which is not of their mask
}

// ---- races ----

__global__ void missing_barrier(float* out) {
  SHARED(float, room, 64);
  room[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = room[63 - threadIdx.x];
}
__device__ float sum_without_leading_barrier(float x, float* room) {
  room[threadIdx.x] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += room[i];
  return sum;
}
__global__ void second_reduction(float* out) {
  SHARED(float, room, 64);
  const float once = sum_without_leading_barrier(1, room);
  out[threadIdx.x] = once + sum_without_leading_barrier(2, room);
}
__global__ void missing_syncwarp(float* out) {
  SHARED(float, room, 64);
  room[threadIdx.x] = float(threadIdx.x);
  const float other = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  out[threadIdx.x] = other + room[threadIdx.x ^ 1];
}
__global__ void all_write_the_same(float* out) {
  SHARED(float, room, 1);
  room[0] = 1;
  __syncthreads();
  out[threadIdx.x] = room[0];
}
__global__ void count_without_atomics(unsigned* bins) {
  ++bins[threadIdx.x % 2];
}
__global__ void blocks_share_a_sum(unsigned* out) {
  if (threadIdx.x == 0) out[0] += 1;
}

// ---- sanitizers of memory and of arithmetic ----

__global__ void past_shared(float* out) {
  SHARED(float, room, 64);
  room[threadIdx.x] = 0;
  __syncthreads();
  float* p = room;
  out[threadIdx.x] = p[threadIdx.x + 1];
}
__global__ void past_dynamic(float* out) {
  DYNAMIC_SHARED(float, room);
  room[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = room[threadIdx.x + 1];
}
__global__ void past_global(float* out) {
  out[threadIdx.x + 1] = 0;
}
__global__ void misaligned(float* out) {
  *reinterpret_cast<cpd::Pack<float>*>(out + 1) = cpd::Pack<float>{};
}
__global__ void overflow(float* out) {
  int x = 0x7fffffff - 62;
  x += int(threadIdx.x);
  out[threadIdx.x] = float(x);
}

// ---- right ----

__global__ void right_count(unsigned* bins) {
  atomicAdd(&bins[threadIdx.x % 2], 1u);
}
__device__ float right_sum(float x, float* room) {
  __syncthreads();
  room[threadIdx.x] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += room[i];
  return sum;
}
// The last block to come sums what all blocks left.
__global__ void last_block_sums(float* partial, unsigned* counter, float* out) {
  SHARED(float, room, 64);
  SHARED(bool, is_last, 1);
  const float once = right_sum(1, room);
  const float sum = once + right_sum(float(blockIdx.x), room);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  if (threadIdx.x == 0) {
    float all = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) all += partial[b];
    out[0] = all;
  }
}
__global__ void right_warp(float* out) {
  DYNAMIC_SHARED(float, room);
  room[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  float x = room[threadIdx.x ^ 1];
  __syncwarp();
  room[threadIdx.x] = 1;
  __syncwarp();
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int by = 8; by > 0; by /= 2) x += __shfl_xor_sync(half, x, by);
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2);
  out[blockIdx.x * 64 + threadIdx.x] = x + float(__popc(odd)) + room[threadIdx.x ^ 1];
}
__global__ void grid_of_three_dims(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * 24 + thread] = int(block * 24 + thread);
}

template <class T, class... Params>
std::vector<T> results(void (*kernel)(Params...), unsigned blocks, size_t count, size_t shared_bytes = 0) {
  std::vector<T> out(count);
  launch_shared(kernel, dim3(blocks), dim3(64), shared_bytes, nullptr, out.data());
  return out;
}

void expect(bool right, const char* what) {
  if (!right) host_model::stop_on(what);
}

}  // namespace

FAULT(missing_barrier) {
  results<float>(missing_barrier, 1, 64);
}
FAULT(second_reduction) {
  results<float>(second_reduction, 1, 64);
}
FAULT(missing_syncwarp) {
  results<float>(missing_syncwarp, 1, 64);
}
FAULT(all_write_the_same) {
  results<float>(all_write_the_same, 1, 64);
}
FAULT(count_without_atomics) {
  results<unsigned>(count_without_atomics, 1, 2);
}
FAULT(blocks_share_a_sum) {
  results<unsigned>(blocks_share_a_sum, 2, 1);
}
FAULT(past_shared) {
  results<float>(past_shared, 1, 64);
}
FAULT(past_dynamic) {
  results<float>(past_dynamic, 1, 64, 64 * sizeof(float));
}
FAULT(past_global) {
  results<float>(past_global, 1, 64);
}
FAULT(misaligned) {
  results<float>(misaligned, 1, 64);
}
FAULT(overflow) {
  results<float>(overflow, 1, 64);
}

CASE(right_count) {
  const auto bins = results<unsigned>(right_count, 3, 2);
  expect(bins[0] == 96 && bins[1] == 96, "right_count: wrong");
}
CASE(last_block_sums) {
  std::vector<float> partial(3), out(1);
  std::vector<unsigned> counter(1);
  launch(last_block_sums, dim3(3), dim3(64), nullptr, partial.data(), counter.data(), out.data());
  expect(out[0] == 64 * 3 + 64 * 3, "last_block_sums: wrong");
}
CASE(right_warp) {
  const auto out = results<float>(right_warp, 2, 128, 64 * sizeof(float));
  for (int i = 0; i < 128; ++i) {
    const float first = float(i % 64 / 16 * 16);  // the sum over 16 lanes, 16 odd lanes, and 1
    expect(out[size_t(i)] == 16 * first + 120 + 16 + 1, "right_warp: wrong");
  }
}
CASE(grid_of_three_dims) {
  std::vector<int> out(24 * 24, -1);
  launch(grid_of_three_dims, dim3(2, 3, 4), dim3(4, 3, 2), nullptr, out.data());
  for (int i = 0; i < 24 * 24; ++i) expect(out[size_t(i)] == i, "grid_of_three_dims: wrong");
}

extern "C" const char* planted(int which, float* out) {
  return host_model::guarded([&] {
    void (*const kernels[])(float*) = {missing_barrier,  divergent_barrier, returned_thread, missing_lane,
                                       outside_own_mask, unset_memory,      absent_source,   second_reduction};
    launch(kernels[which], dim3(1), dim3(64), nullptr, out);
  });
}
