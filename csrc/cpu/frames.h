// Planes of images inside zeros, row after row in one long array: a tap of a convolution is then a constant offset, and
// rows of 7 fill vectors as well. Strides are taken out when planes are copied in or results out: what lies a stride
// apart becomes neighbours (a phase).
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/taps.h"

namespace cpd {
namespace CPD_ISA {
namespace {

// Frame positions [lead, lead + count) hold values first, first + step, ... of a dim.
struct Phase {
  int64_t first, step, lead, count;
};

// What tap `kernel` reads: position p + offset of a phase.
struct AxisTap {
  int64_t kernel, phase, offset;
};

// Positions p < count give values first, first + step, ... of the result.
struct Result {
  int64_t first, step, count;
  std::vector<AxisTap> taps;
};

// How one dim of a tensor is laid out in frames, to be read by some kernel.
struct Axis {
  std::vector<Phase> phases;
  std::vector<Result> results;
  int64_t most = 0, reach = 0;  // positions of a result; the largest offset

  // As long as a row has to be: zeros before the next row serve as those after this one.
  int64_t pitch() const {
    int64_t length = most;
    for (const Phase& p : phases) length = std::max({length, p.lead + p.count, most + reach - p.lead});
    return length;
  }
  void finish() {
    for (const Result& r : results) {
      most = std::max(most, r.count);
      for (const AxisTap& t : r.taps) reach = std::max(reach, t.offset);
    }
    for (Phase& p : phases) p.count = std::max<int64_t>(0, std::min(p.count, most + reach - p.lead));
  }
};

inline Axis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  Axis axis;
  axis.results = {{0, 1, out, {}}};
  std::vector<int64_t> phase_of(size_t(stride), -1);
  for (int64_t j = 0; j < kernel; ++j) {
    const int64_t r = j * dilation % stride;
    if (phase_of[size_t(r)] < 0) {
      phase_of[size_t(r)] = int64_t(axis.phases.size());
      const int64_t lead = padding > r ? (padding - r + stride - 1) / stride : 0, first = lead * stride + r - padding;
      axis.phases.push_back({first, stride, lead, first < in ? (in - 1 - first) / stride + 1 : 0});
    }
    axis.results[0].taps.push_back({j, phase_of[size_t(r)], j * dilation / stride});
  }
  axis.finish();
  return axis;
}

// Of the gradient of the input: value x reads those of the `out` results that read it.
inline Axis backward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  Axis axis;
  int64_t lead = 0;
  for (int64_t b = 0; b < std::min(stride, in); ++b) {
    axis.results.push_back({b, stride, (in - 1 - b) / stride + 1, {}});
    for (int64_t j = 0; j < kernel; ++j) {
      const int64_t at = b + padding - j * dilation;
      if (at % stride) continue;
      axis.results.back().taps.push_back({j, 0, at / stride});
      lead = std::max(lead, -(at / stride));
    }
  }
  for (Result& r : axis.results) {
    for (AxisTap& t : r.taps) t.offset += lead;
  }
  axis.phases = {{0, 1, lead, out}};
  axis.finish();
  return axis;
}

// A tensor of planes, contiguous or with the channels last.
template <class T>
struct Planes {
  T* data;
  int64_t channels, h, w;
  bool last;

  T* at(int64_t n, int64_t y, int64_t x) const { return data + ((n * h + y) * w + x) * channels; }  // channels last
  T* plane(int64_t n, int64_t c) const { return data + (n * channels + c) * h * w; }
};

// Of two vectors, `kStep` lanes of one next to `kStep` lanes of the other, the first half (or the second) of both.
template <int kStep, bool kSecond, class A, int... kLane>
inline vec<A> interleave(vec<A> a, vec<A> b, std::integer_sequence<int, kLane...>) {
  using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int L = kLanes<A>;
  constexpr vec<I> kFirst = {(kLane & kStep ? L + kLane - kStep : kLane)...};
  constexpr vec<I> kRest = {(kLane & kStep ? L + kLane : kLane + kStep)...};
  return __builtin_shuffle(a, b, kSecond ? kRest : kFirst);
}

// kLanes vectors, rows to columns: blocks of kStep x kStep change places, for every power of two.
template <class A, int kStep = 1>
inline void transpose(vec<A>* x) {
  constexpr int L = kLanes<A>;
  using Lanes = std::make_integer_sequence<int, L>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & kStep) continue;
    const vec<A> a = x[i], b = x[i + kStep];
    x[i] = interleave<kStep, false, A>(a, b, Lanes());
    x[i + kStep] = interleave<kStep, true, A>(a, b, Lanes());
  }
  if constexpr (2 * kStep < L) transpose<A, 2 * kStep>(x);
}

// Where live channels of one image are put: slot s has plane_size values for each pair of a row's and a column's phase.
template <class A>
struct Frames {
  A* values;
  int64_t slot_step, plane_size, pitch, rows, slack;
  const std::vector<Phase>& row_phases;
  const std::vector<Phase>& column_phases;

  A* plane(int64_t slot, size_t row_phase, size_t column_phase) const {
    return values + slot * slot_step + int64_t(row_phase * column_phases.size() + column_phase) * plane_size;
  }
  // Zeros where frame row `row` has no values; false where it has.
  bool clear_row(const Phase& phase, int64_t y0, int64_t row, A* plane) const {
    const int64_t at = y0 + row - phase.lead;
    if (0 <= at && at < phase.count) return false;
    std::fill_n(plane + row * pitch, pitch, A(0));
    return true;
  }
};

// Frame rows y0 to y0 + frames.rows of a contiguous plane.
template <class T, class A>
void put_plane(const T* plane, int64_t w, const Frames<A>& f, int64_t slot, int64_t y0, A* buffer) {
  for (size_t i = 0; i < f.row_phases.size(); ++i) {
    const Phase& down = f.row_phases[i];
    for (size_t j = 0; j < f.column_phases.size(); ++j) {
      const Phase& across = f.column_phases[j];
      A* to = f.plane(slot, i, j);
      for (int64_t y = 0; y < f.rows; ++y) {
        if (f.clear_row(down, y0, y, to)) continue;
        const A* row = load(plane + (down.first + (y0 + y - down.lead) * down.step) * w, buffer, w) + across.first;
        A* at = to + y * f.pitch + across.lead;
        if (across.step == 1) {
          std::copy(row, row + across.count, at);
        } else if (across.step == 2) {
          for (int64_t x = 0; x < across.count; ++x) at[x] = row[2 * x];
        } else {
          for (int64_t x = 0; x < across.count; ++x) at[x] = row[x * across.step];
        }
      }
      std::fill_n(to + f.rows * f.pitch, f.slack, A(0));
    }
  }
}

// Neighbouring places with the channels last that fit a vector, and which of them are live.
template <int L>
struct Slab {
  int64_t from;  // the first place that is read: others' lanes are read with them, and not looked at
  int lanes, count;
  int lane[L];
  int64_t slot[L];
};

template <int L>
std::vector<Slab<L>> slabs_of(int64_t channels, int64_t begin, int64_t end, const int64_t* slot, int64_t base) {
  std::vector<Slab<L>> slabs;
  for (int64_t place = begin; place < end; place += L) {
    Slab<L> s{};
    s.from = std::max<int64_t>(0, std::min(place, channels - L));
    s.lanes = int(std::min<int64_t>(L, channels - s.from));
    for (int64_t c = place; c < std::min(end, place + L); ++c) {
      if (slot[c] < 0) continue;
      s.lane[s.count] = int(c - s.from);
      s.slot[s.count++] = slot[c] - base;
    }
    if (s.count) slabs.push_back(s);
  }
  return slabs;
}

// The same of places [begin, end) of an image with the channels last; slot[place] - base is where one goes, if live.
template <class T, class A>
void put_last(const Planes<const T>& image, int64_t n, int64_t begin, int64_t end, const int64_t* slot, int64_t base,
              const Frames<A>& f, int64_t y0) {
  constexpr int L = kLanes<A>;
  const auto slabs = slabs_of<L>(image.channels, begin, end, slot, base);
  int64_t slots = 0;
  for (const auto& s : slabs) slots += s.count;
  A buffer[L];
  for (size_t i = 0; i < f.row_phases.size(); ++i) {
    const Phase& down = f.row_phases[i];
    const int64_t ahead = down.step * image.w * image.channels;  // no pattern that processors see: ask for the next row
    for (int64_t y = 0; y < f.rows; ++y) {
      bool is_empty = false;
      for (int64_t s = 0; s < slots; ++s) {
        for (size_t j = 0; j < f.column_phases.size(); ++j) is_empty = f.clear_row(down, y0, y, f.plane(s, i, j));
      }
      if (is_empty) continue;
      const int64_t row = down.first + (y0 + y - down.lead) * down.step;
      for (size_t j = 0; j < f.column_phases.size(); ++j) {
        const Phase& across = f.column_phases[j];
        const int64_t step = across.step * image.channels;
        for (int64_t x = 0; x < across.count; x += L) {
          const T* pixel = image.at(n, row, across.first) + x * step;
          for (const auto& s : slabs) {
            vec<A> block[L];
            for (int l = 0; l < L; ++l) {
              __builtin_prefetch(pixel + l * step + s.from + ahead);
              if (x + l >= across.count) {
                block[l] = vec<A>{};  // over the zeros at the row's end, and what is written next
              } else if (s.lanes == L) {
                block[l] = load_vec(load(pixel + l * step + s.from, buffer, L));
              } else {
                A some[L] = {};
                store(some, load(pixel + l * step + s.from, buffer, s.lanes), s.lanes);
                block[l] = load_vec(some);
              }
            }
            transpose<A>(block);
            for (int k = 0; k < s.count; ++k) {
              store_vec(f.plane(s.slot[k], i, j) + y * f.pitch + across.lead + x, block[s.lane[k]]);
            }
          }
        }
      }
    }
  }
  for (int64_t s = 0; s < slots; ++s) {
    for (size_t j = 0; j < f.row_phases.size() * f.column_phases.size(); ++j) {
      std::fill_n(f.plane(s, 0, j) + f.rows * f.pitch, f.slack, A(0));
    }
  }
}

// Result rows [y0, y1) of a contiguous plane, from sums a frame's pitch apart.
template <class T, class A>
void take_plane(const A* sums, int64_t pitch, const Result& down, const Result& across, int64_t y0, int64_t y1,
                T* plane, int64_t w, T* buffer) {
  for (int64_t y = y0; y < std::min(y1, down.count); ++y, sums += pitch) {
    T* row = plane + (down.first + y * down.step) * w + across.first;
    if (across.step == 1) {
      store(row, sums, across.count);
    } else {
      store(buffer, sums, across.count);
      for (int64_t x = 0; x < across.count; ++x) row[x * across.step] = buffer[x];
    }
  }
}

// The same of places [begin, end) with the channels last; those that no live channel writes become zero.
template <class T, class A>
void take_last(const A* sums, int64_t sums_step, int64_t pitch, const Result& down, const Result& across, int64_t y0,
               int64_t y1, const Planes<T>& image, int64_t n, int64_t begin, int64_t end, const int64_t* slot,
               int64_t base) {
  constexpr int L = kLanes<A>;
  const int64_t step = across.step * image.channels;
  for (int64_t y = y0; y < std::min(y1, down.count); ++y) {
    for (int64_t x = 0; x < across.count; x += L) {
      const A* row = sums + (y - y0) * pitch + x;
      T* pixel = image.at(n, down.first + y * down.step, across.first) + x * step;
      const int pixels = int(std::min<int64_t>(L, across.count - x));
      for (int64_t place = begin; place < end; place += L) {
        const int lanes = int(std::min<int64_t>(L, end - place));
        vec<A> block[L];
        for (int l = 0; l < L; ++l) {
          const bool is_live = l < lanes && slot[place + l] >= 0;
          block[l] = is_live ? load_vec(row + (slot[place + l] - base) * sums_step) : vec<A>{};
        }
        transpose<A>(block);
        for (int l = 0; l < pixels; ++l) {
          T* to = pixel + l * step + place;
          if constexpr (std::is_same_v<T, A>) {
            if (lanes == L) {
              store_vec(to, block[l]);
              continue;
            }
          }
          A values[L];
          store_vec(values, block[l]);
          store(to, values, lanes);
        }
      }
    }
  }
}

}  // namespace
}  // namespace CPD_ISA
}  // namespace cpd
