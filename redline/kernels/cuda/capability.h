// What kernels may count on, where they run by code made for less.
#pragma once

namespace redline::cuda {

// Of a device's compute capability, 90 for 9.0, and that of the PTX which its code was made from:
// the device's; or 89 where it is Hopper's or later and the code is for less, in which there are no
// clusters and no overlapping launches.
constexpr int usable_capability(int device_capability, int code_capability) {
  return device_capability >= 90 && code_capability < 90 ? 89 : device_capability;
}

// The same for this library's code on a device, which need not be the current one.
int capability_on(int device, int device_capability);

}  // namespace redline::cuda
