// The bindings of csrc/hutchinson.h: pointers and tables of integers in, as cpd_fast/ops/_probe_kernels.py makes them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "hutchinson.h"

namespace py = pybind11;

namespace {

constexpr size_t kTensorFields = 6;  // dtype, address, numel, channels, inner, id

void require(bool is_right, const char* what) {
  if (!is_right) throw std::invalid_argument(what);
}

std::vector<cpd::SignTensor> sign_tensors(const std::vector<int64_t>& numbers) {
  require(numbers.size() % kTensorFields == 0, "rademacher: six numbers a tensor");
  std::vector<cpd::SignTensor> tensors;
  for (size_t i = 0; i < numbers.size(); i += kTensorFields) {
    const int64_t* n = numbers.data() + i;
    require(0 <= n[0] && n[0] <= 3, "rademacher: dtype must be 0 to 3");
    require(n[1] != 0 || n[2] == 0, "rademacher: data must not be null");
    tensors.push_back({cpd::Dtype(n[0]), reinterpret_cast<void*>(n[1]), n[2], n[3], n[4], uint32_t(n[5])});
  }
  return tensors;
}

cpd::HutchinsonReduce reduce_args(uintptr_t entries, int64_t num_entries, const std::vector<uintptr_t>& data,
                                  bool has_signs, uint64_t seed, uint32_t probe, double alpha, uintptr_t out,
                                  bool is_double, uintptr_t bad, int num_threads) {
  require(num_threads >= 1, "hutchinson_reduce: num_threads must be >= 1");
  require(num_entries == 0 || (entries && out && bad), "hutchinson_reduce: entries, out and bad must not be null");
  return {reinterpret_cast<const cpd::ReduceEntry*>(entries),
          num_entries,
          reinterpret_cast<const void* const*>(data.data()),
          int64_t(data.size()),
          has_signs,
          seed,
          probe,
          alpha,
          reinterpret_cast<void*>(out),
          is_double,
          reinterpret_cast<int32_t*>(bad),
          num_threads};
}

cpd::ChannelSums channel_args(uintptr_t channel_starts, uintptr_t cell_ids, uintptr_t cell_starts, uintptr_t index,
                              int64_t num_channels, uintptr_t x, uintptr_t scale, uintptr_t out, bool is_double,
                              int num_threads) {
  const auto table = [](uintptr_t p) { return reinterpret_cast<const int64_t*>(p); };
  return {table(channel_starts),
          table(cell_ids),
          table(cell_starts),
          table(index),
          num_channels,
          reinterpret_cast<const void*>(x),
          reinterpret_cast<const void*>(scale),
          reinterpret_cast<void*>(out),
          is_double,
          num_threads};
}

}  // namespace

void bind_hutchinson(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def(
      "rademacher",
      [](const std::vector<int64_t>& numbers, uint64_t seed, uint32_t probe, bool add, double alpha, int num_threads) {
        require(num_threads >= 1, "rademacher: num_threads must be >= 1");
        const auto tensors = sign_tensors(numbers);
        cpd::rademacher({tensors.data(), int64_t(tensors.size()), seed, probe, add, alpha, num_threads});
      },
      no_gil);
  m.def(
      "reversible_step",
      [](const std::vector<int64_t>& numbers, uint64_t seed, uint32_t probe, float step, bool back, uintptr_t lost,
         uintptr_t is_away, int num_threads) {
        require(num_threads >= 1, "reversible_step: num_threads must be >= 1");
        require(lost && is_away, "reversible_step: lost and is_away must not be null");
        const auto tensors = sign_tensors(numbers);
        for (const auto& t : tensors) require(t.dtype == cpd::Dtype::kF32, "reversible_step: dtype must be fp32");
        cpd::reversible_step({tensors.data(), int64_t(tensors.size()), seed, probe, step, back,
                              reinterpret_cast<int8_t*>(lost), reinterpret_cast<int32_t*>(is_away), num_threads});
      },
      no_gil);
  m.def(
      "small_elements",
      [](uintptr_t x, int64_t numel, float step, int64_t most) {
        require(x != 0, "small_elements: x must not be null");
        std::vector<int64_t> found;
        cpd::small_elements({reinterpret_cast<const float*>(x), numel, step, most, &found});
        return found;
      },
      no_gil);
  m.def(
      "hutchinson_reduce",
      [](uintptr_t entries, int64_t num_entries, const std::vector<uintptr_t>& data, bool has_signs, uint64_t seed,
         uint32_t probe, double alpha, uintptr_t out, bool is_double, uintptr_t bad, int num_threads) {
        cpd::hutchinson_reduce(
            reduce_args(entries, num_entries, data, has_signs, seed, probe, alpha, out, is_double, bad, num_threads));
      },
      no_gil);
  m.def(
      "channel_sums",
      [](uintptr_t channel_starts, uintptr_t cell_ids, uintptr_t cell_starts, uintptr_t index, int64_t num_channels,
         uintptr_t x, uintptr_t scale, uintptr_t out, bool is_double, int num_threads) {
        cpd::channel_sums(channel_args(channel_starts, cell_ids, cell_starts, index, num_channels, x, scale, out,
                                       is_double, num_threads));
      },
      no_gil);
#ifdef CPD_WITH_CUDA
  m.def(
      "rademacher_cuda",
      [](const std::vector<int64_t>& numbers, uint64_t seed, uint32_t probe, bool add, double alpha, uintptr_t stream) {
        const auto tensors = sign_tensors(numbers);
        cpd::rademacher_cuda({tensors.data(), int64_t(tensors.size()), seed, probe, add, alpha, 1},
                             reinterpret_cast<void*>(stream));
      },
      no_gil);
  m.def(
      "hutchinson_reduce_cuda",
      [](const std::vector<int64_t>& table, const std::vector<uintptr_t>& data, bool has_signs, uint64_t seed,
         uint32_t probe, double alpha, uintptr_t out, bool is_double, uintptr_t bad, uintptr_t stream) {
        require(table.size() == 8, "hutchinson_reduce_cuda: the table is eight numbers");
        cpd::hutchinson_reduce_cuda(
            reduce_args(0, 0, data, has_signs, seed, probe, alpha, out, is_double, bad, 1),
            {reinterpret_cast<const cpd::ReduceEntry*>(table[0]), reinterpret_cast<const cpd::ReduceItem*>(table[1]),
             reinterpret_cast<const int64_t*>(table[2]), reinterpret_cast<const int64_t*>(table[3]), table[4], table[5],
             reinterpret_cast<void*>(table[6]), reinterpret_cast<int32_t*>(table[7])},
            reinterpret_cast<void*>(stream));
      },
      no_gil);
  m.def(
      "channel_sums_cuda",
      [](uintptr_t channel_starts, uintptr_t cell_ids, uintptr_t cell_starts, uintptr_t index, int64_t num_channels,
         uintptr_t x, uintptr_t scale, uintptr_t out, bool is_double, uintptr_t stream) {
        cpd::channel_sums_cuda(
            channel_args(channel_starts, cell_ids, cell_starts, index, num_channels, x, scale, out, is_double, 1),
            reinterpret_cast<void*>(stream));
      },
      no_gil);
#endif
}
