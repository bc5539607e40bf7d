// Division of an index by a number that the host knows. The compiler's own division by a variable
// costs twenty instructions in 32 bits and a hundred in 64.
#pragma once

#include <cstdint>

namespace redline::cuda {

// n / d = n m >> (31 + s) for n below 2^31, with s = ceil(log2 d) and m = ceil(2^(31 + s) / d):
// m d exceeds 2^(31 + s) by less than 2^s, so the quotient by less than n 2^s / 2^(31 + s) / d,
// which is below 1 / d (Granlund and Montgomery, "Division by invariant integers", PLDI 1994).
class Divisor {
 public:
  // `divisor` is from 1 to 2^31 - 1.
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << (shift_ - 31)) < divisor) ++shift_;
    factor_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((uint64_t{n} * factor_) >> shift_);
  }
  __device__ __forceinline__ uint32_t remainder(uint32_t n) const {
    return n - quotient(n) * divisor_;
  }

 private:
  uint32_t divisor_, factor_, shift_ = 31;
};

}  // namespace redline::cuda
