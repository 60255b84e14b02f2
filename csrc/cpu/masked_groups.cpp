// Grouped convolutions with few channels a group. Planes of live channels are copied into frames (frames.h), some
// groups at a time, so many rows that they stay in L2; sums of several channels and many positions are made in
// registers (taps.h) and written where live channels are, zeros where they are not. The gradient of the input is the
// same with rows and columns of the weight exchanged; the gradient of the weight is a dot product a tap. Results do not
// depend on the number of threads.
#include "masked_groups.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/frames.h"
#include "cpu/row_sums.h"
#include "cpu/simd.h"

namespace cpd {
namespace CPD_ISA {
namespace {

constexpr int64_t kRoom = 384 * 1024;  // bytes of frames and sums that a thread works on
constexpr int64_t kWindow = 64;        // places with the channels last that are read together: some cache lines

// Groups that are worked on together.
struct Unit {
  int64_t begin, end;
};

std::vector<Unit> units_of(const MaskedGroups& a) {
  std::vector<Unit> units;
  for (int64_t g = 0; g < a.groups; ++g) {
    const auto fits = [&](const LiveChannels& c) { return c.held[g + 1] - c.held[units.back().begin] <= kWindow; };
    if (a.channels_last && !units.empty() && fits(a.inputs) && fits(a.outputs)) {
      units.back().end = g + 1;
    } else {
      units.push_back({g, g + 1});
    }
  }
  return units;
}

int64_t most_live(const std::vector<Unit>& units, const LiveChannels& c) {
  int64_t most = 0;
  for (const Unit& u : units) most = std::max(most, c.starts[u.end] - c.starts[u.begin]);
  return most;
}

// Aligned zeros.
template <class A>
struct Zeros {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<A[], Free> values;

  explicit Zeros(int64_t count)
      : values(static_cast<A*>(::operator new(size_t(count + 1) * sizeof(A), std::align_val_t(64)))) {
    std::fill_n(values.get(), count, A(0));
  }
  A* get() { return values.get(); }
};

int64_t rounded(int64_t x) {  // to whole cache lines, whatever the type
  return (x + 15) / 16 * 16;
}

template <class A>
int64_t slack_of(const Axis& columns) {
  return columns.reach + 2 * kLanes<A>;
}

// Live channels of a unit into frames.
template <class T, class A>
void put_unit(const Planes<const T>& image, int64_t n, const LiveChannels& c, const Unit& u, const Frames<A>& f,
              int64_t y0, A* buffer) {
  const int64_t base = c.starts[u.begin];
  if (image.last) return put_last(image, n, c.held[u.begin], c.held[u.end], c.slot, base, f, y0);
  for (int64_t i = base; i < c.starts[u.end]; ++i) put_plane(image.plane(n, c.at[i]), image.w, f, i - base, y0, buffer);
}

// ---- values: outputs of inputs, or the gradient of inputs of the gradient of outputs ----

// What one result reads: for each channel the same taps.
template <class A>
struct Tapped {
  const Result *down, *across;
  std::vector<int64_t> kernel, offsets;  // of the taps of one channel; of all channels, one after another
};

template <class T>
struct Correlation {
  using A = compute_t<T>;
  const MaskedGroups& a;
  Axis rows, columns;
  const LiveChannels &read, &written;
  bool is_backward;
  std::vector<Unit> units = units_of(a);
  std::vector<Tapped<A>> results{};
  std::vector<A> weights{}, biases{};
  std::vector<int64_t> weight_starts{};  // of groups
  int64_t pitch = 0, phases = 0, plane_size = 0, band = 0, bands = 0, sums_size = 0;

  void measure() {
    pitch = columns.pitch();
    phases = int64_t(rows.phases.size() * columns.phases.size());
    const int64_t slots = most_live(units, read), outputs = most_live(units, written);
    const int64_t a_row = (slots * phases + outputs) * pitch * int64_t(sizeof(A));
    band = std::clamp<int64_t>(kRoom / std::max<int64_t>(a_row, 1) - rows.reach, 4, rows.most);
    bands = (rows.most + band - 1) / band;
    band = (rows.most + bands - 1) / bands;
    plane_size = rounded((band + rows.reach) * pitch + slack_of<A>(columns));
    sums_size = rounded(band * pitch + slack_of<A>(columns));
  }

  void list_taps() {
    int64_t most_read = 0;
    for (int64_t g = 0; g < a.groups; ++g) most_read = std::max(most_read, read.starts[g + 1] - read.starts[g]);
    for (const Result& down : rows.results) {
      for (const Result& across : columns.results) {
        Tapped<A> r{&down, &across, {}, {}};
        for (int64_t c = 0; c < most_read; ++c) {
          for (const AxisTap& i : down.taps) {
            for (const AxisTap& j : across.taps) {
              if (c == 0) r.kernel.push_back(i.kernel * a.kernel_w + j.kernel);
              const int64_t phase = i.phase * int64_t(columns.phases.size()) + j.phase;
              r.offsets.push_back((c * phases + phase) * plane_size + i.offset * pitch + j.offset);
            }
          }
        }
        results.push_back(std::move(r));
      }
    }
  }

  // In the order of use: groups, results, kChannels channels at a time, taps of all channels read.
  void pack_weights() {
    const T* from = static_cast<const T*>(a.weight);
    for (int64_t g = 0; g < a.groups; ++g) {
      weight_starts.push_back(int64_t(weights.size()));
      for (const Tapped<A>& r : results) {
        for (int64_t o = written.starts[g]; o < written.starts[g + 1]; o += kChannels) {
          const int64_t end = std::min(o + kChannels, written.starts[g + 1]);
          for (int64_t i = read.starts[g]; i < read.starts[g + 1]; ++i) {
            for (const int64_t tap : r.kernel) {
              for (int64_t k = o; k < end; ++k) {
                const int64_t row = is_backward ? read.index[i] : written.index[k];
                const int64_t column = is_backward ? written.index[k] : read.index[i];
                A value;
                weights.push_back(
                    *load(from + row * a.weight_row + column * a.column_step + tap * a.tap_step, &value, 1));
              }
            }
          }
        }
      }
    }
    biases.assign(size_t(written.num_live), A(0));
    if (!a.bias || is_backward) return;
    for (int64_t o = 0; o < written.num_live; ++o) {
      biases[size_t(o)] = *load(static_cast<const T*>(a.bias) + written.index[o], &biases[size_t(o)], 1);
    }
  }

  void run(const Planes<const T>& from, const Planes<T>& to) {
    measure();
    list_taps();
    pack_weights();
    const int64_t num_units = int64_t(units.size());
#pragma omp parallel num_threads(a.num_threads)
    {
      Zeros<A> values(most_live(units, read) * phases * plane_size), sums(most_live(units, written) * sums_size);
      std::vector<A> buffer(size_t(std::max(from.w, to.w)));
      std::vector<T> row(static_cast<size_t>(to.w));
#pragma omp for schedule(static)
      for (int64_t job = 0; job < a.n * num_units * bands; ++job) {
        const int64_t n = job / (num_units * bands), y0 = job / num_units % bands * band;
        const Unit& u = units[size_t(job % num_units)];
        const int64_t y1 = std::min(y0 + band, rows.most);
        const Frames<A> f{values.get(),         phases * plane_size,  plane_size,  pitch,
                          y1 - y0 + rows.reach, slack_of<A>(columns), rows.phases, columns.phases};
        if (written.starts[u.begin] < written.starts[u.end]) put_unit(from, n, read, u, f, y0, buffer.data());
        for (size_t r = 0; r < results.size(); ++r) {
          for (int64_t g = u.begin; g < u.end; ++g) sum_group(r, g, u, y1 - y0, values.get(), sums.get());
          take(results[r], n, u, y0, y1, sums.get(), to, row.data());
        }
      }
    }
  }

  void sum_group(size_t which, int64_t g, const Unit& u, int64_t num_rows, const A* values, A* sums) const {
    const Tapped<A>& r = results[which];
    const int64_t channels = read.starts[g + 1] - read.starts[g], taps = channels * int64_t(r.kernel.size());
    const A* weight = weights.data() + weight_starts[size_t(g)];
    const int64_t outputs = written.starts[g + 1] - written.starts[g];
    for (size_t before = 0; before < which; ++before) {
      weight += channels * int64_t(results[before].kernel.size()) * outputs;
    }
    const A* base = values + (read.starts[g] - read.starts[u.begin]) * phases * plane_size;
    const int64_t positions = (num_rows - 1) * pitch + r.across->count;
    for (int64_t o = 0; o < outputs; o += kChannels) {
      const int64_t count = std::min<int64_t>(kChannels, outputs - o), live = written.starts[g] + o;
      correlate(base, r.offsets.data(), taps, weight + o * taps, biases.data() + live,
                sums + (live - written.starts[u.begin]) * sums_size, sums_size, positions, count);
    }
  }

  void take(const Tapped<A>& r, int64_t n, const Unit& u, int64_t y0, int64_t y1, const A* sums, const Planes<T>& to,
            T* buffer) const {
    const int64_t begin = written.held[u.begin], end = written.held[u.end], base = written.starts[u.begin];
    if (to.last) {
      take_last(sums, sums_size, pitch, *r.down, *r.across, y0, y1, to, n, begin, end, written.slot, base);
      return;
    }
    for (int64_t place = begin; place < end; ++place) {
      T* plane = to.plane(n, place);
      if (written.slot[place] >= 0) {
        take_plane(sums + (written.slot[place] - base) * sums_size, pitch, *r.down, *r.across, y0, y1, plane, to.w,
                   buffer);
      } else if (y0 == 0 && &r == results.data()) {
        std::fill_n(plane, to.h * to.w, T{});
      }
    }
  }
};

template <class T>
void forward(const MaskedGroups& a) {
  Correlation<T> c{a,
                   forward_axis(a.input_h, a.output_h, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h),
                   forward_axis(a.input_w, a.output_w, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w),
                   a.inputs,
                   a.outputs,
                   false};
  c.run({static_cast<const T*>(a.input), a.inputs.num_held, a.input_h, a.input_w, a.channels_last},
        {static_cast<T*>(a.output), a.outputs.num_held, a.output_h, a.output_w, a.channels_last});
}

template <class T>
void backward_input(const MaskedGroups& a) {
  Correlation<T> c{a,
                   backward_axis(a.input_h, a.output_h, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h),
                   backward_axis(a.input_w, a.output_w, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w),
                   a.outputs,
                   a.inputs,
                   true};
  c.run({static_cast<const T*>(a.doutput), a.outputs.num_held, a.output_h, a.output_w, a.channels_last},
        {static_cast<T*>(a.dinput), a.inputs.num_held, a.input_h, a.input_w, a.channels_last});
}

// ---- gradients of weights ----

template <class T>
struct WeightGradient {
  using A = compute_t<T>;
  const MaskedGroups& a;
  Axis rows = forward_axis(a.input_h, a.output_h, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h);
  Axis columns = forward_axis(a.input_w, a.output_w, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w);
  std::vector<Phase> own_rows{{0, 1, 0, a.output_h}}, own_columns{{0, 1, 0, a.output_w}};  // of the gradient
  std::vector<Unit> units = units_of(a);
  int64_t pitch = columns.pitch(), phases = int64_t(rows.phases.size() * columns.phases.size());
  int64_t slots = most_live(units, a.inputs), outputs = most_live(units, a.outputs);
  int64_t images = 0, band = 0, plane_size = 0, own_size = 0;  // images, or rows of one, that are worked on together
  std::vector<int64_t> offsets{};                              // of all taps of all channels

  void measure() {
    const int64_t a_row = (slots * phases + outputs) * pitch * int64_t(sizeof(A));
    const int64_t fit = kRoom / std::max<int64_t>(a_row, 1);
    images = std::clamp<int64_t>(fit / (a.output_h + rows.reach), 1, a.n);
    band = std::clamp<int64_t>(fit - rows.reach, 4, a.output_h);
    plane_size = rounded((band + rows.reach) * pitch + slack_of<A>(columns));
    own_size = rounded(band * pitch + slack_of<A>(columns));
    for (int64_t c = 0; c < slots; ++c) {
      for (const AxisTap& i : rows.results[0].taps) {
        for (const AxisTap& j : columns.results[0].taps) {
          const int64_t phase = i.phase * int64_t(columns.phases.size()) + j.phase;
          offsets.push_back((c * images * phases + phase) * plane_size + i.offset * pitch + j.offset);
        }
      }
    }
    offsets.resize(offsets.size() + kTaps, 0);
  }

  void run() {
    measure();
    std::fill_n(static_cast<T*>(a.dweight), a.weight_rows * a.weight_row, T{});
    if (a.dbias) std::fill_n(static_cast<T*>(a.dbias), a.weight_rows, T{});
#pragma omp parallel num_threads(a.num_threads)
    {
      Zeros<A> values(slots * images * phases * plane_size), own(outputs * images * own_size);
      std::vector<A> buffer(size_t(std::max(a.input_w, a.output_w)));
      std::vector<double> sums, biases;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < int64_t(units.size()); ++i) {
        const Unit& u = units[size_t(i)];
        sums.assign(size_t(outputs * slots * a.kernel_h * a.kernel_w), 0.0);
        biases.assign(size_t(outputs), 0.0);
        for (int64_t n = 0; n < a.n; n += images) {
          for (int64_t y0 = 0; y0 < a.output_h; y0 += band) {
            const int64_t count = std::min(images, a.n - n), y1 = std::min(y0 + band, a.output_h);
            put(u, n, count, y0, y1, values.get(), own.get(), buffer.data());
            add(u, count, y1 - y0, values.get(), own.get(), sums.data(), biases.data());
          }
        }
        write(u, sums.data(), biases.data());
      }
    }
  }

  void put(const Unit& u, int64_t n, int64_t count, int64_t y0, int64_t y1, A* values, A* own, A* buffer) const {
    const Planes<const T> x{static_cast<const T*>(a.input), a.inputs.num_held, a.input_h, a.input_w, a.channels_last};
    const Planes<const T> d{static_cast<const T*>(a.doutput), a.outputs.num_held, a.output_h, a.output_w,
                            a.channels_last};
    const int64_t slack = slack_of<A>(columns);
    for (int64_t k = 0; k < count; ++k) {
      const Frames<A> f{values + k * phases * plane_size,
                        images * phases * plane_size,
                        plane_size,
                        pitch,
                        y1 - y0 + rows.reach,
                        slack,
                        rows.phases,
                        columns.phases};
      put_unit(x, n + k, a.inputs, u, f, y0, buffer);
      const Frames<A> g{own + k * own_size, images * own_size, own_size, pitch, y1 - y0, slack, own_rows, own_columns};
      put_unit(d, n + k, a.outputs, u, g, y0, buffer);
    }
  }

  void add(const Unit& u, int64_t count, int64_t num_rows, const A* values, const A* own, double* sums,
           double* biases) const {
    const Parts parts{count, phases * plane_size, own_size, num_rows * pitch};
    for (int64_t g = u.begin; g < u.end; ++g) {
      const int64_t i = a.inputs.starts[g] - a.inputs.starts[u.begin];
      const int64_t o = a.outputs.starts[g] - a.outputs.starts[u.begin];
      const int64_t channels = a.outputs.starts[g + 1] - a.outputs.starts[g];
      const int64_t taps = (a.inputs.starts[g + 1] - a.inputs.starts[g]) * a.kernel_h * a.kernel_w;
      const A* gradient = own + o * images * own_size;
      dots(values + i * images * phases * plane_size, offsets.data(), taps, gradient, images * own_size, channels,
           parts, sums);
      sums += channels * taps;
      for (int64_t c = 0; a.dbias && c < channels; ++c) {
        for (int64_t k = 0; k < count; ++k) {
          const A* d = gradient + (c * images + k) * own_size;
          for (int64_t y = 0; y < num_rows; ++y) {
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t x = 0; x < a.output_w; ++x) sum += d[y * pitch + x];
            biases[o + c] += double(sum);
          }
        }
      }
    }
  }

  void write(const Unit& u, const double* sums, const double* biases) const {
    const int64_t size = a.kernel_h * a.kernel_w, base = a.outputs.starts[u.begin];
    for (int64_t g = u.begin; g < u.end; ++g) {
      for (int64_t o = a.outputs.starts[g]; o < a.outputs.starts[g + 1]; ++o) {
        for (int64_t i = a.inputs.starts[g]; i < a.inputs.starts[g + 1]; ++i) {
          for (int64_t tap = 0; tap < size; ++tap) {
            const A value = A(*sums++);
            const int64_t at = a.outputs.index[o] * a.weight_row + a.inputs.index[i] * a.column_step + tap * a.tap_step;
            store(static_cast<T*>(a.dweight) + at, &value, 1);
          }
        }
        const A value = A(biases[o - base]);
        if (a.dbias) store(static_cast<T*>(a.dbias) + a.outputs.index[o], &value, 1);
      }
    }
  }
};

template <class T>
void backward_weight(const MaskedGroups& a) {
  WeightGradient<T>{a}.run();
}

}  // namespace

void masked_groups(const MaskedGroups& args) {
  CPD_FOR_DTYPE(forward)
}
void masked_groups_input(const MaskedGroups& args) {
  CPD_FOR_DTYPE(backward_input)
}
void masked_groups_weight(const MaskedGroups& args) {
  CPD_FOR_DTYPE(backward_weight)
}

}  // namespace CPD_ISA
}  // namespace cpd
