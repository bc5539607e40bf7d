// A tensor of a test: memory of its own, exactly as large as the view, so that a step outside it is
// seen by AddressSanitizer; filled with numbers, or poisoned so that an element left alone shows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <utility>

#include "redline/core/tensor_view.h"

namespace redline::test {

// The value of element `index` of a floating buffer; 16-bit types are widened. Not inlined: where
// the size is known but not the dtype, g++ 12 warns about the cases of the wider dtypes.
[[gnu::noinline]] inline double read(const TensorView& view, int64_t index) {
  switch (view.dtype) {
    case DType::float64:
      return view.as<double>()[index];
    case DType::float32:
      return view.as<float>()[index];
    default: {
      const uint32_t bits = view.as<uint16_t>()[index];
      if (view.dtype == DType::bfloat16) {
        float value;
        const uint32_t wide = bits << 16;
        std::memcpy(&value, &wide, sizeof value);
        return value;
      }
      const int exponent = (bits >> 10) & 31;
      const double fraction = (bits & 1023) / 1024.0;
      if (exponent == 31) return fraction != 0 ? NAN : INFINITY;
      const double size =
          exponent ? std::ldexp(1 + fraction, exponent - 15) : std::ldexp(fraction, -14);
      return bits & 0x8000 ? -size : size;
    }
  }
}

// Small multiples of 1/4 between -2 and 2, never 0: exact in every floating dtype. Not inlined, as
// above.
[[gnu::noinline]] inline void fill(const TensorView& view, int64_t index) {
  const double value = (index % 7 - 3.5) / 2;
  switch (view.dtype) {
    case DType::float64:
      view.as<double>()[index] = value;
      return;
    case DType::float32:
      view.as<float>()[index] = static_cast<float>(value);
      return;
    case DType::int64:
      view.as<int64_t>()[index] = index % 3;
      return;
    case DType::int32:
      view.as<int32_t>()[index] = static_cast<int32_t>(index % 3);
      return;
    case DType::boolean:
      view.as<bool>()[index] = index % 2;
      return;
    default: {
      const float narrow = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &narrow, sizeof bits);
      const uint32_t exponent = ((bits >> 23) & 255) - 112;  // from a bias of 127 to one of 15
      const uint32_t half = (bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023);
      view.as<uint16_t>()[index] = view.dtype == DType::bfloat16 ? bits >> 16 : half;
    }
  }
}

class Buffer {
 public:
  Buffer(DType dtype, std::initializer_list<int64_t> sizes) {
    view_.dtype = dtype;
    view_.present = true;
    for (int64_t size : sizes) view_.sizes[view_.rank++] = size;
    int64_t stride = 1;
    for (int axis = view_.rank - 1; axis >= 0; --axis) {
      view_.strides[axis] = stride;
      stride *= view_.sizes[axis];
    }
    memory_ = std::make_unique<unsigned char[]>(view_.bytes());
    view_.data = memory_.get();
    poison();
  }

  Buffer&& filled() && {
    for (int64_t index = 0; index < view_.numel(); ++index) fill(view_, index);
    return std::move(*this);
  }

  // All bits set: NaN in every floating dtype.
  void poison() { std::memset(view_.data, 0xff, view_.bytes()); }

  // Every element was written, with a finite number.
  bool is_finite() const {
    for (int64_t index = 0; index < view_.numel(); ++index) {
      if (!std::isfinite(read(view_, index))) return false;
    }
    return true;
  }

  operator TensorView() const { return view_; }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  TensorView view_;
};

}  // namespace redline::test
