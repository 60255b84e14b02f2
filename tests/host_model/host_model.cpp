// Fibers and their scheduler; see host_model.h.
#include "host_model.h"

#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_model {
namespace {

constexpr size_t kStack = 64 * 1024;

enum State { kRunnable, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = kRunnable;
  int line = 0, shuffles = 0;
};

struct Warp {
  uint64_t slots[2][32];
  int arrived = 0, line = 0;
};

Order order = kForward;
std::mt19937 generator;
ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::map<const void*, std::vector<char>> shared;
const std::function<void()>* body = nullptr;
int current = 0;
std::string error;

void fail(const std::string& what) {
  if (error.empty()) error = what + " in block " + std::to_string(blockIdx.x);
}

void place(int i) {
  current = i;
  const unsigned u = unsigned(i);
  threadIdx = dim3(u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y);
}

void give_way() {
  const int self = current;
  swapcontext(&fibers[size_t(self)].context, &scheduler);
}

void start() {
  (*body)();
  fibers[size_t(current)].state = kDone;
  swapcontext(&fibers[size_t(current)].context, &scheduler);
}

// The next thread to run, or -1.
int pick() {
  std::vector<int> ready;
  for (int i = 0; i < int(fibers.size()); ++i) {
    if (fibers[size_t(i)].state == kRunnable) {
      if (order == kForward) return i;
      ready.push_back(i);
    }
  }
  if (ready.empty()) return -1;
  return order == kReverse ? ready.back() : ready[generator() % ready.size()];
}

// All threads wait: open the barrier if every one of them is at it.
bool open_barrier() {
  for (const Fiber& f : fibers) {
    if (f.state == kDone) return fail("a thread returned while others wait at line " + std::to_string(f.line)), false;
    if (f.state != kAtBarrier) return fail("deadlock: a shuffle lacks lanes, line " + std::to_string(f.line)), false;
    if (f.line != fibers[0].line) {
      return fail("divergent __syncthreads: lines " + std::to_string(fibers[0].line) + " and " +
                  std::to_string(f.line)),
             false;
    }
  }
  for (Fiber& f : fibers) f.state = kRunnable;
  return true;
}

void run_block() {
  const size_t threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  shared.clear();
  fibers = std::vector<Fiber>(threads);
  warps = std::vector<Warp>((threads + 31) / 32);
  for (Fiber& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  while (error.empty()) {
    const int next = pick();
    if (next >= 0) {
      place(next);
      swapcontext(&scheduler, &fibers[size_t(next)].context);
    } else if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == kDone; })) {
      return;
    } else if (!open_barrier()) {
      return;
    }
  }
}

}  // namespace

void set_order(int new_order, unsigned seed) {
  order = Order(new_order);
  generator.seed(seed);
}

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  body = &thread;
  error.clear();
  for (unsigned i = 0; i < grid.x && error.empty(); ++i) {
    blockIdx = dim3(order == kReverse ? grid.x - 1 - i : i);
    run_block();
  }
  fibers.clear();
  if (!error.empty()) throw std::runtime_error(error);
}

void barrier(int line) {
  Fiber& f = fibers[size_t(current)];
  f.state = kAtBarrier;
  f.line = line;
  give_way();
}

uint64_t shuffle(uint64_t value, int from, int line) {
  Fiber& f = fibers[size_t(current)];
  const size_t number = size_t(current) / 32;
  Warp& warp = warps[number];
  // Two sets of slots in turn: a fast lane's next shuffle must not overwrite what a slow lane has yet to read.
  uint64_t* slots = warp.slots[f.shuffles++ % 2];
  if (warp.arrived == 0) {
    std::memset(slots, 0xff, sizeof(warp.slots[0]));
    warp.line = line;
  }
  if (warp.line != line) fail("divergent shuffle: lines " + std::to_string(warp.line) + " and " + std::to_string(line));
  slots[current % 32] = value;
  f.state = kAtShuffle;
  f.line = line;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    for (size_t i = 32 * number; i < 32 * number + 32; ++i) fibers[i].state = kRunnable;
  }
  give_way();
  return slots[from];
}

void* shared_array(const void* tag, size_t bytes) {
  std::vector<char>& array = shared[tag];
  if (array.empty()) array.assign(bytes, char(0xff));
  return array.data();
}

}  // namespace host_model
