// What kernels may count on, where they run by code made for less.
#pragma once

namespace redline::cuda {

// `device`'s compute capability, 90 for 9.0; or 89 where it is Hopper's or later and this library
// has nothing for it but PTX for less, in which there are no clusters and no overlapping launches.
int usable_capability(int device, int capability);

}  // namespace redline::cuda
