// Tensors by logical (row-major) element, whatever their memory: how probes count them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "hutchinson.h"

namespace cpd {
namespace CPD_ISA {
namespace {

constexpr int64_t kFillElements = 1 << 16;

// Elements [begin, end) of one tensor: what a thread takes at a time. Begins at a multiple of kFillElements.
struct Part {
  int64_t tensor, begin, end;
};
inline std::vector<Part> parts_of(const SignTensor* tensors, int64_t count) {
  std::vector<Part> parts;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t numel = tensors[i].numel;
    for (int64_t begin = 0; begin < numel; begin += kFillElements) {
      parts.push_back({i, begin, std::min(numel, begin + kFillElements)});
    }
  }
  return parts;
}

// Visits logical elements [begin, end) of a channels-last tensor: visit(offset in memory, i), i counts from begin.
template <class Visit>
inline void each_last(int64_t begin, int64_t end, int64_t channels, int64_t inner, Visit visit) {
  const int64_t length = channels * inner;
  for (int64_t f = begin; f < end;) {
    const int64_t row = f / length, e = f - row * length, stop = std::min(end, (row + 1) * length);
    int64_t c = e / inner, k = e - c * inner;
    for (; f < stop; ++f) {
      visit(row * length + k * channels + c, f - begin);
      if (++k == inner) {
        k = 0;
        ++c;
      }
    }
  }
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd
