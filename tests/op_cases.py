"""Every op on a few numbers, for what is asked of each alike."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cases import randn
from redline import ops

ROWS, COLS, VOCABULARY, SCALAR = 6, 40, 24, ()
HEADS = (ROWS, 5, 3, 16)  # [batch, tokens, heads, head_dim]
QKV = (ROWS, 5, 5 * 16)
MATRIX, VECTOR, PACKED = (ROWS, COLS), (COLS,), (ROWS, 2 * COLS)


@dataclass(frozen=True)
class OpCase:
    """op(*inputs), of normal data in these shapes; `per_row` says whose leading axis is rows of
    which each has the same bits alone, none where rows are not alone in what they give."""

    op: Callable
    shapes: tuple
    per_row: tuple = ()
    trained: bool = True  # whether it has a derivative
    random: bool = False

    def inputs(self, dtype, device):
        return [
            randn(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(self.shapes)
        ]


def rows_of(x):
    """A number for each of x's rows: the same in a batch and alone."""
    return (x.detach().reshape(x.shape[0], -1)[:, 0].float() * 1000).long() % VOCABULARY


def tables(x):
    angles = torch.arange(5 * 8.0, device=x.device).view(5, 8)
    return angles.cos(), angles.sin()


def norms():
    rms, layer = (MATRIX, VECTOR), (MATRIX, VECTOR, VECTOR)
    dropped_rms = ops.bias_dropout_residual_rms_norm
    dropped_layer = ops.bias_dropout_residual_layer_norm
    return {
        "rms_norm": OpCase(ops.rms_norm, rms, (0,)),
        "layer_norm": OpCase(ops.layer_norm, layer, (0,)),
        "layer_norm-amax": OpCase(
            lambda *given: ops.layer_norm(*given, return_amax=True), layer, trained=False
        ),
        "residual_rms_norm": OpCase(ops.residual_rms_norm, (MATRIX, *rms), (0, 1)),
        "residual_layer_norm": OpCase(ops.residual_layer_norm, (MATRIX, *layer), (0, 1)),
        "bias_dropout_residual_rms_norm": OpCase(
            lambda x, r, b, w: dropped_rms(x, b, r, 0.25, w),
            (MATRIX, MATRIX, VECTOR, VECTOR),
            random=True,
        ),
        "bias_dropout_residual_layer_norm": OpCase(
            lambda x, r, b, *w: dropped_layer(x, b, r, 0.25, *w),
            (MATRIX, MATRIX, VECTOR, VECTOR, VECTOR),
            random=True,
        ),
    }


def elementwise():
    def gated(x, row_scale, bias):
        return ops.gated_activation(x, bias=bias, row_scale=row_scale)

    return {
        "activation": OpCase(ops.activation, (MATRIX, VECTOR), (0,)),
        "gated_activation": OpCase(gated, (PACKED, (ROWS,), (2 * COLS,)), (0, 1)),
        "gated_activation_pair": OpCase(ops.gated_activation_pair, (MATRIX, MATRIX), (0, 1)),
        "bias_dropout_add": OpCase(
            lambda x, b, r: ops.bias_dropout_add(x, b, r, 0.25),
            (MATRIX, VECTOR, MATRIX),
            random=True,
        ),
        "rotary": OpCase(lambda x: ops.rotary(x, *tables(x)), (HEADS,), (0,)),
        "rotary_pair": OpCase(
            lambda q, k: ops.rotary_pair(q, k, *tables(q)), (HEADS, HEADS), (0, 1)
        ),
        "qkv_rotary": OpCase(lambda x: ops.qkv_rotary(x, *tables(x), 3, 1), (QKV,), (0,)),
        "qkv_rotary_split": OpCase(
            lambda x: ops.qkv_rotary_split(x, *tables(x), 3, 1), (QKV,), (0,)
        ),
        "softmax": OpCase(
            lambda x, sink: ops.softmax(x, causal=True, sink=sink), ((ROWS, 3, 5, 9), (3,)), (0,)
        ),
        "softmax-plain": OpCase(ops.softmax, (MATRIX,), (0,)),
        "attention": OpCase(
            lambda q, k, v: ops.attention(q, k, v, causal=True, deterministic=True),
            ((2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16)),
        ),
    }


def losses():
    def loss(x, *args, **options):
        return ops.cross_entropy(x, rows_of(x), *args, **options)

    def head(*inputs, **options):
        x, weight, bias = inputs
        return ops.fused_linear_cross_entropy(x, weight, rows_of(x), bias, **options)

    of_head = (MATRIX, (VOCABULARY, COLS), (VOCABULARY,))
    return {
        "cross_entropy": OpCase(lambda x: loss(x, "none", z_loss=0.1), (MATRIX,), (0,)),
        "cross_entropy-mean": OpCase(loss, (MATRIX,)),
        "cross_entropy-predictions": OpCase(
            lambda x: loss(x, "none", return_predictions=True)[0], (MATRIX,), (0,)
        ),
        "cross_entropy-promised": OpCase(lambda x: loss(x, "sum", loss_scale=1.0), (MATRIX,)),
        "fused_linear_cross_entropy": OpCase(head, of_head),
        "fused_linear_cross_entropy-promised": OpCase(
            lambda *inputs: head(*inputs, loss_scale=1.0), of_head
        ),
        "embedding": OpCase(
            lambda x, weight: ops.embedding(rows_of(x), weight),
            (MATRIX, (VOCABULARY, COLS)),
            (0,),
        ),
    }


def products():
    def mlp(x, norm_weight, *rest):
        return ops.norm_mlp(x, norm_weight, None, *rest)

    return {
        "linear": OpCase(ops.linear, (MATRIX, (16, COLS), (16,))),
        "norm_linear": OpCase(
            lambda x, g, *rest: ops.norm_linear(x, g, None, *rest),
            (MATRIX, VECTOR, (16, COLS), (16,)),
        ),
        "norm_mlp": OpCase(mlp, (MATRIX, VECTOR, (32, COLS), (32,), (COLS, 16), VECTOR)),
        "gemm": OpCase(torch.ops.redline.gemm, (MATRIX, (COLS, 16)), trained=False),
        "gemm_gelu": OpCase(torch.ops.redline.gemm_gelu, (MATRIX, (COLS, 16)), trained=False),
        "gemm_into": OpCase(gemm_into, (MATRIX, (COLS, 16)), trained=False),
    }


def gemm_into(a, b):
    out = torch.ones(a.shape[0], b.shape[1], device=a.device)
    torch.ops.redline.gemm_into(out, a, b)
    return out


def steps():
    return {
        "adamw_step": OpCase(adamw_step, (MATRIX, MATRIX), trained=False),
        "gradient_norm": OpCase(lambda *x: ops.gradient_norm(x), (MATRIX, VECTOR), trained=False),
        "clip_coefficient": OpCase(
            lambda x: ops.clip_coefficient(ops.gradient_norm([x]), 1.0), (MATRIX,), trained=False
        ),
        "scale_gradients": OpCase(scale_gradients, (MATRIX, VECTOR), trained=False),
        "embedding_backward_into": OpCase(
            embedding_backward_into, (MATRIX, (VOCABULARY, COLS)), trained=False
        ),
    }


def adamw_step(parameter, gradient):
    parameter = parameter.clone()
    averages = [torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2)]
    rate = torch.tensor(0.1, device=parameter.device, dtype=torch.float64)
    step = torch.zeros((), device=parameter.device)
    lists = [[parameter], [gradient], *([a] for a in averages), [], [step]]
    ops.adamw_step(*lists, learning_rate=rate)
    return (parameter, *averages)


def scale_gradients(*gradients):
    gradients = [gradient.clone() for gradient in gradients]
    ops.scale_gradients(gradients, torch.tensor(0.3, device=gradients[0].device))
    return tuple(gradients)


def embedding_backward_into(y_grad, buffer):
    buffer = buffer.clone()
    ops.embedding_backward_into(buffer, y_grad, rows_of(y_grad))
    return buffer


# name: case; behind a dash what of the op it is.
OPS = norms() | elementwise() | losses() | products() | steps()
TRAINED = [name for name, case in OPS.items() if case.trained]
