// The norm that opens a fused node (norm_linear, norm_mlp): what it keeps for backward, the
// normalised input rebuilt from that, and its share of the gradients.
#pragma once

#include "redline/ops/norm_inner.h"
#include "redline/ops/torch.h"

namespace redline::ops {

struct NormParameters {
  std::optional<at::Tensor> weight = {}, bias = {};  // [cols]; bias: layer_norm alone
};

struct NormPartOptions {
  std::string kind = "rms_norm";  // or layer_norm
  double epsilon = 1e-5;
  bool zero_centered = false;
  double dropout = 0;  // of x before the residual joins: the probability, 0 where nothing is drawn
};

// Throws where the kind is neither, or a tensor does not fit; `op` is what messages begin with.
void check_norm_part(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& residual,
                     const NormParameters& parameters, const NormPartOptions& options);

// Edges of a node in the order of forward's tensors: those that were given.
class Edges {
 public:
  explicit Edges(torch::autograd::AutogradContext* ctx) : ctx_(ctx) {}

  // Whether the gradient of the next tensor is wanted.
  bool next(bool given = true) { return given && ctx_->needs_input_grad(edge_++); }

 private:
  torch::autograd::AutogradContext* ctx_;
  size_t edge_ = 0;
};

// The tensors that a node saves of its norm: the first of its saved variables.
struct NormKept {
  at::Tensor source;  // x, or the sum
  at::Tensor weight, bias, mean, inverse_std, rng_state;

  static constexpr size_t count = 6;
  // The beginning of a node's list; undefined tensors where backward needs none of it.
  torch::autograd::variable_list saved(bool needed) const {
    torch::autograd::variable_list list(count);
    if (needed) list = {source, weight, bias, mean, inverse_std, rng_state};
    return list;
  }
  static NormKept from(const torch::autograd::variable_list& saved) {
    return {saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]};
  }
};

class NormPart {
 public:
  struct Output {
    at::Tensor normalized;  // [..., cols] of the product's dtype
    at::Tensor sum;         // residual + dropout(x), with one
    NormKept kept;
  };

  // `dtype`: the product's.
  NormPart(const at::Tensor& x, const std::optional<at::Tensor>& residual,
           const NormParameters& parameters, const NormPartOptions& options, at::ScalarType dtype);

  // As a node's entry of saved_data, one plain value with the node's own bits, and back: an entry
  // costs 0.1 us to write and read.
  struct Packed {
    int64_t value;
    static constexpr int own_bit = 32;  // the node's first

    explicit Packed(int64_t value) : value(value) {}
    bool has(int bit) const { return value >> (own_bit + bit) & 1; }
    void set(int bit, bool on) { value |= static_cast<int64_t>(on) << (own_bit + bit); }
  };
  Packed packed() const;
  // `packed` with the node's bits, and the dropout where there is one.
  void save(torch::autograd::AutogradContext* ctx, Packed packed) const;
  NormPart(Packed packed, torch::autograd::AutogradContext* ctx);

  // Below autograd.
  Output forward(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                 const NormParameters& parameters) const;

  // Whether one of forward's tensors wants a gradient; known in forward.
  bool trained() const { return trained_; }

  struct Needs {
    bool x, residual, weight, bias;
    bool any() const { return x || residual || weight || bias; }
  };
  Needs needs(Edges& edges) const;

  struct Gradients {
    at::Tensor x = {}, residual = {}, weight = {}, bias = {};
    at::Tensor normalized = {};  // forward's, its bits
  };
  // Either of the two may be undefined. With `rebuilds`, `normalized` comes out of the same kernel
  // as the gradients, or is rebuilt alone where there are none.
  Gradients backward(const NormKept& kept, const at::Tensor& normalized_grad,
                     const at::Tensor& sum_grad, const Needs& needs, bool rebuilds) const;

  bool has_residual() const { return has_residual_; }

 private:
  at::Tensor rebuild(const NormKept& kept) const;

  Norm norm_;
  double epsilon_ = 0;  // forward's alone
  double dropout_ = 0;
  bool zero_centered_, has_residual_, has_weight_, has_bias_, trained_ = false;
  at::ScalarType x_dtype_, dtype_;
};

}  // namespace redline::ops
