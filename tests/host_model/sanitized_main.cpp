// Runs the CUDA bodies over small problems under sanitizers; with an argument, one planted fault.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" void set_order(int order, unsigned seed);
extern "C" const char* channel_kl(int dtype, const void* student, const void* teacher, const void* grad, void* loss,
                                  void* dstudent, int64_t outer, int64_t reduce, int64_t inner, double inv_temperature,
                                  double loss_scale, double grad_scale);
extern "C" const char* scale_rows(int dtype, const void* grad, void* dstudent, int64_t outer, int64_t reduce,
                                  int64_t inner);
extern "C" const char* planted(int which, float* out);

namespace {

void stop(const char* message) {
  if (message == nullptr) return;
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

// Arrays are as long as they have to be, less `missing` elements of the gradient.
template <class T>
void kl(int dtype, int64_t outer, int64_t reduce, int64_t inner, size_t missing) {
  const size_t all = size_t(outer * reduce * inner), columns = size_t(outer * inner);
  std::vector<T> student(all), teacher(all), dstudent(all - missing);
  for (size_t i = 0; i < all; ++i) {
    student[i] = T(i * 37 % 11);
    teacher[i] = T(i * 53 % 13);
  }
  std::vector<double> grad(columns), loss(columns);  // fp32 uses half of it
  stop(channel_kl(dtype, student.data(), teacher.data(), grad.data(), loss.data(), dstudent.data(), outer, reduce,
                  inner, 0.5, 4, 2));
}

}  // namespace

int main(int count, char** arguments) {
  set_order(0, 0);
  if (count > 1 && std::strcmp(arguments[1], "scratch") == 0) {
    kl<float>(0, 1, 37, 1, 1);
    return 0;
  }
  if (count > 1) {
    std::vector<float> out(64);
    stop(planted(std::atoi(arguments[1]), out.data()));
    return 0;
  }
  const int64_t sizes[][3] = {{3, 37, 1}, {2, 64, 1}, {1, 2049, 1}, {1, 16387, 1}, {2, 19, 37}};
  for (int order = 0; order < 3; ++order) {
    set_order(order, 3);
    for (const auto& size : sizes) {
      kl<float>(0, size[0], size[1], size[2], 0);
      if (order == 1) {
        kl<double>(1, size[0], size[1], size[2], 0);
        kl<uint16_t>(2, size[0], size[1], size[2], 0);
        kl<uint16_t>(3, size[0], size[1], size[2], 0);
      }
    }
    std::vector<float> grad(2 * 37, 2), dstudent(2 * 7 * 37, 1);
    stop(scale_rows(0, grad.data(), dstudent.data(), 2, 7, 37));
    stop(scale_rows(0, grad.data(), dstudent.data(), 74, 7, 1));
  }
  std::puts("clean");
}
