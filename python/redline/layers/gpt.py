"""GPT: embedding, layers, final norm, and a head or the loss."""
# Over budget: parameters: the seven that say a model's shape may come without names.

import math

import torch

from redline import ops
from redline.layers.embedding import Embedding
from redline.layers.linear import Linear
from redline.layers.norm import LayerNorm, RMSNorm
from redline.layers.transformer_layer import TransformerLayer


class GPT(torch.nn.Module):
    """A decoder-only language model; further keywords are TransformerLayer's.

    forward(tokens [batch, sequence]) -> logits [batch, sequence, vocabulary]; with targets of the
    tokens' shape -> the mean cross entropy, a float32 scalar; reduction "none" gives each token's,
    "sum" their sum. return_predictions -> (loss, predictions), for evaluation: the class of the
    largest logit of each token, int64, out of the read that the loss makes; not with a fused loss,
    which has no logits. `tied`: embedding.weight is the head.

    inplace_backward: backward writes the gradient of the loss's logits over them, which saves a
    buffer of their size; a second backward through the same loss is then an error. Forward hooks on
    ``head`` see the logits and may keep them: with one registered nothing is written over.

    fused_loss: the loss is ops.fused_linear_cross_entropy, which never holds all logits: "none"
    (off); "promise" computes its gradients in forward, for an upstream gradient of 1, and rescales
    them for another (not with reduction="none"); "recompute" computes the logits again in backward
    and keeps least. There is then nothing for a hook on ``head`` to see, nor for its backward_dw():
    both are errors.

    >>> GPT(8192, 256, 704, layers=2, heads=4)(torch.zeros(1, 16, dtype=torch.int64)).shape
    torch.Size([1, 16, 8192])
    """

    def __init__(
        self,
        vocabulary,
        hidden_size,
        ffn_hidden_size,
        layers,
        heads,
        kv_heads=None,
        tied=False,
        *,
        inplace_backward=True,
        fused_loss="none",
        normalization="RMSNorm",
        eps=1e-5,
        zero_centered=False,
        device=None,
        dtype=None,
        **layer,
    ):
        super().__init__()
        if fused_loss not in ("none", "promise", "recompute"):
            raise ValueError(
                f"GPT: fused_loss: expected none, promise or recompute, not {fused_loss}"
            )
        factory = {"device": device, "dtype": dtype}
        norm = {"eps": eps, "zero_centered": zero_centered}
        layer |= {"normalization": normalization, **norm, **factory}
        self.inplace_backward, self.fused_loss = inplace_backward, fused_loss
        self.embedding = Embedding(vocabulary, hidden_size, **factory)
        self.layers = torch.nn.ModuleList(
            TransformerLayer(hidden_size, ffn_hidden_size, heads, kv_heads, **layer)
            for _ in range(layers)
        )
        final_norm = RMSNorm if normalization == "RMSNorm" else LayerNorm
        self.final_norm = final_norm(hidden_size, **norm, **factory)
        self.head = None if tied else Linear(hidden_size, vocabulary, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self):
        """GPT-2's: matrices normal(0, 0.02), those that write the stream over sqrt(2 layers)."""
        writer_std = 0.02 / math.sqrt(2 * max(len(self.layers), 1))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("proj.weight", "fc2_weight"))
                torch.nn.init.normal_(parameter, 0.0, writer_std if writes else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
            else:  # a norm's gain
                torch.nn.init.constant_(parameter, 0.0 if self.final_norm.zero_centered else 1.0)

    def forward(self, tokens, targets=None, *, reduction="mean", return_predictions=False, **where):
        if return_predictions:
            self._check_predictions(targets)
        x, residual, dropout = self.embedding(tokens), None, 0.0
        for layer in self.layers:
            x, residual, dropout = layer.forward_residual(x, residual, dropout, **where)
        x = (
            self.final_norm(x)
            if residual is None
            else self.final_norm(x, residual, dropout=dropout)[0]
        )
        if targets is not None and self.fused_loss != "none":
            return self._fused_loss(x, targets, reduction)
        if self.head is None:
            logits = torch.nn.functional.linear(x, self.embedding.weight)
        else:
            logits = self.head(x)
        if targets is None:
            return logits
        seen = self.head is not None and len(self.head._forward_hooks) > 0
        inplace = self.inplace_backward and logits.requires_grad and not seen
        return ops.cross_entropy(
            logits,
            targets,
            reduction,
            inplace_backward=inplace,
            return_predictions=return_predictions,
        )

    def _check_predictions(self, targets):
        if targets is None:
            raise RuntimeError("GPT: targets: expected some beside return_predictions, not None")
        if self.fused_loss != "none":
            raise RuntimeError(
                "GPT: return_predictions: expected False beside fused_loss="
                f"'{self.fused_loss}', which has no logits"
            )

    def _fused_loss(self, x, targets, reduction):
        weight, options = self.embedding.weight, {}
        if self.head is not None:
            for given, what in (
                (self.head._forward_hooks or self.head._forward_pre_hooks, "forward hooks"),
                (self.head.delay_weight_grad, "delay_weight_grad"),
            ):
                if given:
                    raise RuntimeError(
                        f"GPT: fused_loss: expected a head without {what}, for its forward does "
                        "not run; fused_loss='none' runs it"
                    )
            weight = self.head.weight
            options = self.head.destination(weight)
        # Whoever asks for each token's loss reduces it in his own way: nothing is promised.
        promised = self.fused_loss == "promise" and reduction != "none"
        scale = 1.0 if promised else None
        options |= {"reduction": reduction, "loss_scale": scale}
        return ops.fused_linear_cross_entropy(x, weight, targets, **options)
