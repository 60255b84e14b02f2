// What every C interface of the bodies needs: exceptions as messages.
#pragma once
#include <cstring>
#include <exception>

namespace host_model {

// Null, or what went wrong; the text stands until the next call.
template <class F>
const char* guarded(F f) {
  static char message[512];
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), sizeof(message) - 1);
    return message;
  }
}

}  // namespace host_model
