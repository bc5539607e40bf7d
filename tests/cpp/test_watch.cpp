#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "redline/core/watch.h"
#include "redline/kernels/cuda/alignment.h"
#include "redline/kernels/cuda/softmax/mask.h"

namespace redline {
namespace {

class Notes final : public Watcher {
 public:
  Notes() {
    current = this;
    find_watcher.store([]() -> Watcher* { return current; });
    ++watchers;
  }
  ~Notes() override { --watchers; }

  void choice(std::string_view why) override { lines.emplace_back(why); }
  void fallback(const Fallback& found, std::string_view why) override {
    lines.push_back(message(found.op, ": ", found.tensor, ": ", why, "; ", found.instead));
  }
  void launch(const Launch& launch) override { lines.push_back(launch.kernel); }
  void bytes(int64_t count) override { lines.push_back(std::to_string(count)); }

  std::vector<std::string> lines;
  static inline Watcher* current = nullptr;
};

struct Piece {
  int* texts;
};
std::string to_text(const Piece& piece) {
  ++*piece.texts;
  return "piece";
}

// A [rows, cols] view of memory that nothing reads.
TensorView rows_at(uintptr_t address, int64_t cols, int64_t stride, DType dtype = DType::bfloat16) {
  TensorView view;
  view.data = reinterpret_cast<void*>(address);
  view.dtype = dtype;
  view.rank = 2;
  view.present = true;
  view.sizes[0] = 4;
  view.sizes[1] = cols;
  view.strides[0] = stride;
  view.strides[1] = 1;
  return view;
}

TEST(Watch, AReasonIsPutTogetherForAWatcherAlone) {
  int texts = 0;
  note_choice("a ", Piece{&texts});
  note_fallback({"op", "x", "give another"}, Piece{&texts});
  EXPECT_EQ(texts, 0);
  Notes notes;
  note_choice("a ", Piece{&texts}, " of ", 2);
  note_bytes(7);
  note_fallback({"op", "x", "give another"}, Piece{&texts});
  EXPECT_EQ(texts, 2);
  EXPECT_EQ(notes.lines,
            (std::vector<std::string>{"a piece of 2", "7", "op: x: piece; give another"}));
}

TEST(Watch, AlignedRowsAreNoNews) {
  Notes notes;
  const TensorView x = rows_at(4096, 64, 72), absent;
  EXPECT_TRUE(cuda::are_aligned("op", {{"x", &x}, {"bias", &absent}}));
  EXPECT_TRUE(notes.lines.empty());
}

TEST(Watch, WhatIsUnalignedIsNamed) {
  Notes notes;
  const TensorView whole = rows_at(4096, 64, 64), odd = rows_at(4096, 65, 65),
                   late = rows_at(4098, 64, 64), apart = rows_at(4096, 64, 65);
  EXPECT_FALSE(cuda::are_aligned("op", {{"x", &whole}, {"y", &odd}}));
  EXPECT_FALSE(cuda::are_aligned("op", {{"x", &late}}));
  EXPECT_FALSE(cuda::are_aligned("op", {{"x", &apart}}, "another way"));
  cuda::note_address("op", "gradients", late.data, DType::float32);
  cuda::note_address("op", "gradients", whole.data, DType::float32);
  EXPECT_EQ(
      notes.lines,
      (std::vector<std::string>{
          "op: y: rows of 65 bfloat16 are no multiple of 16 bytes: one element per access; pad the "
          "rows to a multiple of 16 bytes",
          "op: x: its address is 2 bytes past a multiple of 16: one element per access; give a "
          "tensor with an address of its own, such as a clone",
          "op: x: a stride of 65 bfloat16 is no multiple of 16 bytes: another way; give it "
          "contiguous, or with strides in multiples of 16 bytes",
          "op: gradients: an address is 2 bytes past a multiple of 16: one element per access; "
          "give a tensor with an address of its own, such as a clone"}));
}

// A mask of 2 x 3 x 4 x 64, whose axes are so many bytes apart.
TensorView mask_at(uintptr_t address, int64_t batch, int64_t query, int64_t key) {
  TensorView view;
  view.data = reinterpret_cast<void*>(address);
  view.dtype = DType::boolean;
  view.rank = 4;
  view.present = true;
  std::copy_n(std::initializer_list<int64_t>{2, 3, 4, 64}.begin(), 4, view.sizes);
  std::copy_n(std::initializer_list<int64_t>{batch, 0, query, key}.begin(), 4, view.strides);
  return view;
}

TEST(Watch, AMaskThatIsNotReadByVectorsIsNamed) {
  Notes notes;
  EXPECT_TRUE(cuda::is_read_by_vectors({}, 8));
  EXPECT_TRUE(cuda::is_read_by_vectors(mask_at(4104, 256, 64, 1), 8));
  EXPECT_TRUE(notes.lines.empty());
  EXPECT_FALSE(cuda::is_read_by_vectors(mask_at(4096, 4, 1, 0), 8));
  EXPECT_FALSE(cuda::is_read_by_vectors(mask_at(4096, 512, 128, 2), 8));
  EXPECT_FALSE(cuda::is_read_by_vectors(mask_at(4100, 256, 64, 1), 8));
  EXPECT_FALSE(cuda::is_read_by_vectors(mask_at(4096, 260, 65, 1), 8));
  EXPECT_EQ(notes.lines,
            (std::vector<std::string>{
                "softmax: mask: its one key stands for all: one element per access; give one with "
                "the scores' keys",
                "softmax: mask: its keys are 2 bytes apart: one element per access; give it "
                "contiguous",
                "softmax: mask: its address is 4 bytes past a multiple of 8: one element per "
                "access; give a tensor with an address of its own, such as a clone",
                "softmax: mask: a stride of 260 bytes is no multiple of 8: one element per access; "
                "give it contiguous"}));
}

}  // namespace
}  // namespace redline
