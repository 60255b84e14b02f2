// Fibers and their scheduler; see host_model.h. Never compiled with -fsanitize=thread: what it does itself is not a
// thread's doing; memset, malloc and the like are seen all the same, so fibers call none. HM_TSAN and HM_ASAN say which
// sanitizer is told about the fibers.
#include "host_model.h"

#include <sys/mman.h>

#include <deque>
#include <memory>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef HM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef HM_TSAN
#include <sanitizer/tsan_interface.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- one stack gives way to another ----

#if defined(__x86_64__)
// Twenty times faster than swapcontext, which asks the kernel for the signal mask every time.
extern "C" void hm_switch(void** save, void* load);
asm(R"(
.text
.globl hm_switch
.hidden hm_switch
.type hm_switch,@function
hm_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hm_switch,.-hm_switch
)");
#endif

namespace host_model {
namespace {

constexpr size_t kStack = 128 * 1024, kGuard = 4096;
constexpr int kMostThreads = 1024, kMostArrays = 16, kMostMeetings = 4;

enum State { kRunnable, kAtBarrier, kAtCollective, kDone };

struct Stack {
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  char* bottom = nullptr;
  size_t size = 0;
  void* tsan = nullptr;  // the sanitizer's fiber
  void* fake = nullptr;  // the sanitizer's stack of locals
};

struct Fiber {
  Stack stack;
  State state = kDone;
  Place place{};
};

// The lanes of one mask of one warp.
struct Meeting {
  unsigned mask = 0, round = 0, arrived = 0;
  Place place{};
  uint64_t slots[2][32];
  char marks[2];
};

struct Array {
  const void* tag;
  void* bytes;
};

Order order = kForward;
std::mt19937 generator;
Stack launcher;
// Blocks alternate between two crews: to a race detector, neighbouring blocks are then different threads.
std::deque<Fiber> crews[2];
std::deque<Fiber>* crew = nullptr;
int threads = 0, current = 0, waiting = 0, done = 0;
uint64_t runnable[kMostThreads / 64];
Meeting meetings[kMostThreads / 32][kMostMeetings];
Array arrays[kMostArrays];
int num_arrays = 0;
size_t dynamic_bytes = 0;
std::vector<void*> garbage;  // shared arrays live until the launch is over: addresses are not used twice
const std::function<void()>* body = nullptr;
std::string error;
// What barriers, the launch and its end order: bytes that the race detector knows by their address.
char barrier_marks[2], start_mark, end_mark, array_mark;
unsigned barriers = 0;

void release(char* mark) {
#ifdef HM_TSAN
  __tsan_release(mark);
#else
  (void)mark;
#endif
}

void acquire(char* mark) {
#ifdef HM_TSAN
  __tsan_acquire(mark);
#else
  (void)mark;
#endif
}

void announce(Stack& to) {
#ifdef HM_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#else
  (void)to;
#endif
}

void change(Stack& from, Stack& to) {
  announce(to);
#ifdef HM_ASAN
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  hm_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef HM_ASAN
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

Fiber& self() {
  return (*crew)[size_t(current)];
}

std::string text(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

void fail(const std::string& what) {
  if (!error.empty()) return;
  error = what + " in block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
          std::to_string(blockIdx.z) + ")";
}

void set_runnable(int i) {
  (*crew)[size_t(i)].state = kRunnable;
  runnable[i / 64] |= uint64_t(1) << i % 64;
}

void wait_as(State state, Place place) {
  Fiber& f = self();
  f.state = state;
  f.place = place;
  runnable[current / 64] &= ~(uint64_t(1) << current % 64);
}

void give_way() {
  change(self().stack, launcher);
}

[[noreturn]] void abandon(const std::string& what) {
  fail(what);
  for (;;) give_way();  // never resumed: the launcher sees the error
}

[[noreturn]] void entry() {
#ifdef HM_ASAN
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  launcher.bottom = static_cast<char*>(const_cast<void*>(bottom));
  launcher.size = size;
#endif
  acquire(&start_mark);
  (*body)();
  release(&end_mark);
  wait_as(kDone, {});
  ++done;
  for (;;) give_way();
}

// A stack whose first switch enters entry().
void prepare(Fiber& f) {
  Stack& s = f.stack;
  if (s.bottom == nullptr) {
    void* room = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) throw std::runtime_error("host model: no memory for stacks");
    mprotect(room, kGuard, PROT_NONE);
    s.bottom = static_cast<char*>(room) + kGuard;
    s.size = kStack;
#ifdef HM_TSAN
    s.tsan = __tsan_create_fiber(0);
#endif
  }
#ifdef HM_ASAN
  __asan_unpoison_memory_region(s.bottom, s.size);
  s.fake = nullptr;
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(s.bottom + s.size) - 1;  // 8 past a multiple of 16, as after a call
  *top = nullptr;                                                // where entry() would return to
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  s.top = top;
#else
  getcontext(&s.context);
  s.context.uc_stack.ss_sp = s.bottom;
  s.context.uc_stack.ss_size = s.size;
  s.context.uc_link = nullptr;
  makecontext(&s.context, &entry, 0);
#endif
}

// The next thread to run, or -1.
int pick() {
  const int words = (threads + 63) / 64;
  if (order == kForward) {
    for (int w = 0; w < words; ++w) {
      if (runnable[w]) return 64 * w + __builtin_ctzll(runnable[w]);
    }
    return -1;
  }
  if (order == kReverse) {
    for (int w = words - 1; w >= 0; --w) {
      if (runnable[w]) return 64 * w + 63 - __builtin_clzll(runnable[w]);
    }
    return -1;
  }
  int count = 0;
  for (int w = 0; w < words; ++w) count += __builtin_popcountll(runnable[w]);
  if (count == 0) return -1;
  int left = int(generator() % unsigned(count));
  for (int w = 0;; ++w) {
    const int here = __builtin_popcountll(runnable[w]);
    if (left >= here) {
      left -= here;
      continue;
    }
    uint64_t bits = runnable[w];
    for (; left > 0; --left) bits &= bits - 1;
    return 64 * w + __builtin_ctzll(bits);
  }
}

void place(int i) {
  current = i;
  const unsigned u = unsigned(i);
  threadIdx = dim3(u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y);
}

// All threads wait: open the barrier if every one of them is at it.
void open_barrier() {
  const Fiber* first = nullptr;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = (*crew)[size_t(i)];
    if (f.state == kAtCollective) {
      return fail("deadlock: a warp collective lacks lanes of its mask at " + text(f.place) + ", thread " +
                  std::to_string(i));
    }
    if (f.state == kAtBarrier && first == nullptr) first = &f;
  }
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = (*crew)[size_t(i)];
    if (f.state == kDone) {
      return fail("thread " + std::to_string(i) + " returned while others wait at " + text(first->place));
    }
    if (f.place.line != first->place.line || std::strcmp(f.place.file, first->place.file) != 0) {
      return fail("divergent __syncthreads: thread " + std::to_string(i) + " is at " + text(f.place) +
                  ", others wait at " + text(first->place));
    }
  }
  ++barriers;
  for (int i = 0; i < threads; ++i) set_runnable(i);
}

void run_block(size_t number) {
  crew = &crews[number % 2];
  num_arrays = done = 0;
  for (auto& warp : meetings) {
    for (Meeting& m : warp) m.mask = m.arrived = m.round = 0;
  }
  for (int i = 0; i < threads; ++i) {
    prepare((*crew)[size_t(i)]);
    set_runnable(i);
  }
  while (error.empty()) {
    const int next = pick();
    if (next >= 0) {
      place(next);
      change(launcher, (*crew)[size_t(next)].stack);
    } else if (done == threads) {
      return;
    } else {
      open_barrier();
    }
  }
}

// Memory of the block, as if the launcher had made it before the block started.
void* allocate(size_t bytes) {
  announce(launcher);
  void* p = std::malloc(std::max<size_t>(bytes, 1));
  std::memset(p, 0xff, bytes);
  garbage.push_back(p);
  release(&array_mark);
  announce(self().stack);
  return p;
}

}  // namespace

void set_order(int new_order, unsigned seed) {
  order = Order(new_order);
  generator.seed(seed);
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  threads = int(block.x * block.y * block.z);
  if (threads < 1 || threads > kMostThreads) throw std::runtime_error("host model: a block has 1 to 1024 threads");
  dynamic_bytes = shared_bytes;
  body = &thread;
  error.clear();
  std::fill(std::begin(runnable), std::end(runnable), 0);
#ifdef HM_TSAN
  launcher.tsan = __tsan_get_current_fiber();
#endif
  for (auto& c : crews) {
    if (c.size() < size_t(threads)) c.resize(size_t(threads));
  }
  release(&start_mark);
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t i = 0; i < blocks && error.empty(); ++i) {
    const size_t b = order == kReverse ? blocks - 1 - i : i;
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    run_block(i);
  }
  acquire(&end_mark);
  for (void* p : garbage) std::free(p);
  garbage.clear();
  if (!error.empty()) throw std::runtime_error(error);
}

void barrier(Place place) {
  char* mark = &barrier_marks[barriers % 2];
  release(mark);
  wait_as(kAtBarrier, place);
  give_way();
  acquire(mark);
}

int lane() {
  return current % 32;
}

namespace {

// Where the lanes of `mask` of this warp meet.
Meeting& join(unsigned mask, Place place) {
  Meeting* all = meetings[current / 32];
  Meeting* m = nullptr;
  for (int i = 0; i < kMostMeetings && m == nullptr; ++i) {
    if (all[i].mask == mask || all[i].mask == 0) m = &all[i];
  }
  if (m == nullptr) abandon("host model: more than 4 different masks in one warp at " + text(place));
  m->mask = mask;
  if (!(mask >> lane() & 1)) {
    abandon("thread " + std::to_string(current) + " is not of the mask of its own collective at " + text(place));
  }
  if (m->arrived == 0) m->place = place;
  if (m->place.line != place.line || std::strcmp(m->place.file, place.file) != 0) {
    abandon("divergent warp collective: thread " + std::to_string(current) + " is at " + text(place) +
            ", others wait at " + text(m->place));
  }
  return *m;
}

void wait_for_lanes(Meeting& m, Place place) {
  wait_as(kAtCollective, place);
  if (++m.arrived == unsigned(__builtin_popcount(m.mask))) {
    m.arrived = 0;
    ++m.round;
    for (int i = 0; i < 32; ++i) {
      if (m.mask >> i & 1) set_runnable(current / 32 * 32 + i);
    }
  }
  give_way();
}

}  // namespace

const uint64_t* exchange(unsigned mask, uint64_t value, Place place) {
  Meeting& m = join(mask, place);
  // Two sets of slots in turn: a fast lane's next exchange must not overwrite what a slow lane has yet to read.
  uint64_t* slots = m.slots[m.round % 2];
  if (m.arrived == 0) {
    for (int i = 0; i < 32; ++i) slots[i] = ~uint64_t(0);
  }
  slots[lane()] = value;
  wait_for_lanes(m, place);
  return slots;
}

void warp_barrier(unsigned mask, Place place) {
  Meeting& m = join(mask, place);
  char* mark = &m.marks[m.round % 2];
  release(mark);
  wait_for_lanes(m, place);
  acquire(mark);
}

void* shared_array(const void* tag, size_t bytes) {
  int i = 0;
  while (i < num_arrays && arrays[i].tag != tag) ++i;
  if (i == num_arrays) {
    if (i == kMostArrays) abandon("host model: more than 16 shared arrays");
    ++num_arrays;
    arrays[i] = {tag, allocate(bytes)};
  }
  acquire(&array_mark);
  return arrays[i].bytes;
}

void* dynamic_shared() {
  return shared_array(&dynamic_bytes, dynamic_bytes);
}

}  // namespace host_model

extern "C" void set_order(int order, unsigned seed) {
  host_model::set_order(order, seed);
}
