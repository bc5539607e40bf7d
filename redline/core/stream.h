// All that a kernel knows of the machine it runs on.
#pragma once

namespace redline {

// `handle` is a cudaStream_t. `capability` is 90 for sm_90, less where the code is made for less.
// `sm_margin` multiprocessors are left to others (communication kernels, for one).
struct Stream {
  void* handle = nullptr;
  int device = 0;
  int sm_count = 0;
  int capability = 0;
  int sm_margin = 0;

  int usable_sms() const { return sm_count > sm_margin ? sm_count - sm_margin : 1; }
};

}  // namespace redline
