// A step along a probe that can be taken back bit for bit: one byte an element says what rounding lost.
#include <cmath>

#include "cpu/logical.h"
#include "cpu/philox.h"
#include "cpu/signed_sums.h"
#include "hutchinson.h"

namespace cpd {
namespace CPD_ISA {
namespace {

// Away: y = x + s, lost = bits(x) - bits(y - s). Back: bits(x) = bits(y - s) + lost.
template <bool kBack>
inline void move(float* x, int8_t* lost, float s) {
  const float before = *x;
  if (kBack) {
    *x = as_float(as_bits(before - s) + uint32_t(int32_t(*lost)));
  } else {
    const float after = before + s;
    *lost = int8_t(int32_t(as_bits(before) - as_bits(after - s)));
    *x = after;
  }
}

template <bool kBack>
void step(const ReversibleStep& args, const SignTensor& tensor, int8_t* lost, int64_t begin, int64_t end) {
  const Counter counter{uint32_t(args.seed), uint32_t(args.seed >> 32), tensor.id, args.probe};
  float* x = static_cast<float*>(tensor.data);
  const float length = args.step;
  Signs signs;
  for (; begin < end; begin += kChunk) {
    const int64_t stop = std::min(end, begin + kChunk);
    signs.make(begin, stop, counter);
    if (tensor.channels > 0) {
      each_last(begin, stop, tensor.channels, tensor.inner, [&](int64_t offset, int64_t i) {
        move<kBack>(x + offset, lost + begin + i, flip(length, signs.bit(begin + i) << 31));
      });
      continue;
    }
    float* y = x + begin;
    int8_t* l = lost + begin;
    each_sign(
        signs, begin, stop,
        [&](uint32_t word, int64_t i) {
          __builtin_prefetch(reinterpret_cast<const char*>(y + i) + kAhead, 1, 3);
          __builtin_prefetch(reinterpret_cast<const char*>(y + i + 16) + kAhead, 1, 3);
#pragma omp simd
          for (int j = 0; j < 32; ++j) move<kBack>(y + i + j, l + i + j, flip(length, word << (31 - j) & 0x80000000u));
        },
        [&](uint32_t bit, int64_t i) { move<kBack>(y + i, l + i, flip(length, bit << 31)); });
  }
}

}  // namespace

void small_elements(const SmallElements& args) {
  const float bound = args.step / 16;
  const auto is_small = [&](float x) { return int(!(std::fabs(x) >= bound) & (as_bits(x) != 0)); };  // NaN too
  constexpr int64_t kTogether = 256;
  for (int64_t i = 0; i < args.numel; i += kTogether) {
    const int64_t end = std::min(args.numel, i + kTogether);
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = i; j < end; ++j) any |= is_small(args.x[j]);
    for (int64_t j = i; any && j < end; ++j) {
      if (is_small(args.x[j])) args.found->push_back(j);
    }
    if (int64_t(args.found->size()) > args.most) return;
  }
}

void reversible_step(const ReversibleStep& args) {
  const std::vector<Part> parts = parts_of(args.tensors, args.count);
  std::vector<int8_t*> lost(size_t(args.count), args.lost);
  for (int64_t i = 1; i < args.count; ++i) lost[size_t(i)] = lost[size_t(i) - 1] + args.tensors[i - 1].numel;
  const int64_t count = int64_t(parts.size());
#pragma omp parallel for schedule(static) num_threads(args.num_threads) if (args.num_threads > 1 && count > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Part& part = parts[size_t(i)];
    const SignTensor& tensor = args.tensors[part.tensor];
    const auto run = args.back ? step<true> : step<false>;
    run(args, tensor, lost[size_t(part.tensor)], part.begin, part.end);
  }
  *args.is_away = args.back ? 0 : 1;
}

}  // namespace CPD_ISA
}  // namespace cpd
