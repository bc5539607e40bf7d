"""redline.explain: every op says what it runs; the bytes, the reasons, the inputs left alone."""

import pytest
import torch

import redline
from cases import DEVICES, randn, strided
from contract import equal_bits
from redline import ops

devices = pytest.mark.parametrize("device", DEVICES)
ROWS, COLS = 48, 64


def normal(*shape, device, dtype=torch.float32, seed=0):
    return randn(*shape, dtype=dtype, device=device, seed=seed).requires_grad_()


def norm(device, count):
    return (normal(ROWS, COLS, device=device), *(normal(COLS, device=device) for _ in range(count)))


def tables(device):
    angles = torch.arange(9 * 8.0, device=device).view(9, 8)
    return angles.cos(), angles.sin()


def classes(device, count):
    return torch.arange(ROWS, device=device) % count


def dropped(device, count):
    """x, the input bias, residual and probability, then the parameters of a norm."""
    x, *parameters = norm(device, count)
    return (x, parameters[0], normal(ROWS, COLS, device=device, seed=1), 0.5, *parameters)


def step(device):
    p, g, m, v = (torch.ones(ROWS, COLS, device=device) for _ in range(4))
    return [p], [g], [m], [v], [], [torch.zeros((), device=device)]


# Each op: its inputs and options on a device.
CASES = {
    "activation": lambda d: ((normal(ROWS, COLS, device=d), normal(COLS, device=d)), {}),
    "adamw_step": lambda d: (step(d), {"learning_rate": torch.tensor(0.1, device=d)}),
    "attention": lambda d: (
        [normal(2, 16, 4, 64, device=d, dtype=torch.bfloat16, seed=i) for i in range(3)],
        {"causal": True},
    ),
    "bias_dropout_add": lambda d: (
        (normal(ROWS, COLS, device=d), normal(COLS, device=d), normal(ROWS, COLS, device=d), 0.5),
        {},
    ),
    "bias_dropout_residual_layer_norm": lambda d: (dropped(d, 2), {}),
    "bias_dropout_residual_rms_norm": lambda d: (dropped(d, 1), {}),
    "clip_coefficient": lambda d: ((torch.tensor(2.0, device=d), 1.0), {}),
    "cross_entropy": lambda d: ((normal(ROWS, COLS, device=d), classes(d, COLS)), {}),
    "embedding": lambda d: ((classes(d, 9), normal(9, COLS, device=d)), {}),
    "embedding_backward_into": lambda d: (
        (torch.zeros(9, COLS, device=d), torch.ones(ROWS, COLS, device=d), classes(d, 9)),
        {},
    ),
    "fused_linear_cross_entropy": lambda d: (
        (normal(ROWS, COLS, device=d), normal(32, COLS, device=d), classes(d, 32)),
        {},
    ),
    "gated_activation": lambda d: ((normal(ROWS, COLS, device=d),), {"kind": "geglu"}),
    "gated_activation_pair": lambda d: (
        (normal(ROWS, COLS, device=d), normal(ROWS, COLS, device=d, seed=1)),
        {},
    ),
    "gradient_norm": lambda d: (([torch.ones(ROWS, COLS, device=d)],), {}),
    "layer_norm": lambda d: (norm(d, 2), {}),
    "linear": lambda d: ((normal(ROWS, COLS, device=d), normal(32, COLS, device=d)), {}),
    "norm_linear": lambda d: ((*norm(d, 1), None, normal(32, COLS, device=d)), {}),
    "norm_mlp": lambda d: (
        (*norm(d, 1), None, normal(32, COLS, device=d), None, normal(COLS, 16, device=d), None),
        {},
    ),
    "qkv_rotary": lambda d: ((normal(2, 9, 4 * 16, device=d), *tables(d), 2, 1), {}),
    "qkv_rotary_split": lambda d: ((normal(2, 9, 4 * 16, device=d), *tables(d), 2, 1), {}),
    "residual_layer_norm": lambda d: (
        (normal(ROWS, COLS, device=d), *norm(d, 2)),
        {},
    ),
    "residual_rms_norm": lambda d: ((normal(ROWS, COLS, device=d), *norm(d, 1)), {}),
    "rms_norm": lambda d: (norm(d, 1), {}),
    "rotary": lambda d: ((normal(2, 9, 4, 16, device=d), *tables(d)), {}),
    "rotary_pair": lambda d: (
        (normal(2, 9, 4, 16, device=d), normal(2, 9, 2, 16, device=d), *tables(d)),
        {},
    ),
    "scale_gradients": lambda d: (
        ([torch.ones(ROWS, COLS, device=d)], torch.tensor(0.5, device=d)),
        {},
    ),
    "softmax": lambda d: ((normal(ROWS, COLS, device=d),), {"causal": True}),
}
every_op = pytest.mark.parametrize("name", CASES)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def test_the_cases_are_the_ops():
    assert set(CASES) == set(ops.__all__) - {"WeightGradientQueue"}


@every_op
@devices
def test_every_op_is_explained(name, device):
    """Each launch: its kernel, its configuration, its reason; what the op was given stays."""
    inputs, options = CASES[name](device)
    before = [t.detach().clone() for t in tensors_in([inputs, options])]
    state = torch.get_rng_state()
    found = redline.explain(getattr(ops, name), *inputs, **options)
    equal_bits(tensors_in([inputs, options]), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.op == name and found.fallbacks == ()
    trained = any(t.requires_grad for t in tensors_in([inputs, options]))
    assert {launch.direction for launch in found.launches} == (
        {"forward", "backward"} if trained else {"forward"}
    )
    for launch in found.launches:
        if launch.kernel.startswith("aten::"):
            assert launch.configuration == {}
            continue
        assert launch.kernel and launch.why, launch
        if launch.kernel == "cublasLtMatmul":
            assert launch.configuration == {}
            continue
        if device == "cpu":
            assert launch.configuration.keys() == {"instruction_set", "chunks", "threads"}
            assert launch.configuration["instruction_set"] == torch.ops.redline.instruction_set()
            assert 1 <= launch.configuration["threads"] <= launch.configuration["chunks"]
        else:
            assert launch.configuration.keys() == {"grid", "block", "shared_bytes", "cluster"}
            assert all(n >= 1 for n in launch.configuration["grid"] + launch.configuration["block"])
    assert found.forward_bytes > 0 and (found.backward_bytes > 0) == trained


@devices
def test_bytes_are_inputs_read_and_outputs_written_once(device):
    x, weight = norm(device, 1)
    found = redline.explain(ops.rms_norm, x, weight)
    matrix, vector, statistic = 4 * ROWS * COLS, 4 * COLS, 4 * ROWS
    assert found.forward_bytes == 2 * matrix + vector + statistic
    assert found.backward_bytes == 3 * matrix + 2 * vector + statistic
    assert found.bytes == found.forward_bytes + found.backward_bytes
    p, g, m, v, _, t = step(device)
    rate = torch.tensor(0.1, device=device)
    found = redline.explain(ops.adamw_step, p, g, m, v, [], t, learning_rate=rate)
    assert found.bytes == 7 * matrix + 2 * 4 + 4  # the gradient alone is read only
    tokens, rows = classes(device, 9), normal(9, COLS, device=device)
    found = redline.explain(ops.embedding, tokens, rows.detach())
    assert found.bytes == 8 * ROWS + 2 * matrix  # the rows of the tokens, not the table
    product = redline.explain(ops.linear, x.detach(), rows.detach())
    assert product.bytes == 4 * (ROWS * COLS + 9 * COLS + ROWS * 9)
    x, upstream = torch.ones(ROWS, COLS, device=device), torch.ones(ROWS, 9, device=device)
    buffer = torch.ones(9, COLS, device=device)
    into = torch.ops.redline.linear_weight_grad_into
    added = redline.explain(into, buffer, upstream, x)
    written = redline.explain(into, buffer, upstream, x, accumulate=False)
    if device == "cuda":
        assert added.bytes == written.bytes + buffer.nbytes


@devices
def test_products_name_their_library(device):
    x, weight = normal(ROWS, COLS, device=device), normal(9, COLS, device=device)
    products = redline.explain(ops.linear, x, weight).launches
    assert [launch.direction for launch in products] == ["forward", "backward", "backward"]
    kernel, library = "aten::mm", "oneDNN or MKL"
    if device == "cuda":
        kernel, library = "cublasLtMatmul", "cuBLASLt, by its heuristic"
    for launch in products:
        assert launch.kernel == kernel
        assert launch.why == f"the product is the library's: {library}"


@pytest.mark.parametrize("name", ["addmm", "baddbmm", "bmm", "mm"])
def test_a_product_of_torchs_is_one_step(name):
    """On the CPU a bias is copied to where the product is added, which is no step of ours."""
    batch = (2,) if "b" in name else ()
    x, y = torch.ones(*batch, 3, 4), torch.ones(*batch, 4, 5)
    given = (torch.ones(*batch, 3, 5),) if "add" in name else ()
    found = redline.explain(getattr(torch, name), *given, x, y)
    assert [launch.kernel for launch in found.launches] == [f"aten::{name}"]
    assert found.bytes == x.nbytes + y.nbytes + (1 + len(given)) * x.nbytes // 4 * 5


@pytest.mark.parametrize("call", [ops.linear, torch.nn.functional.linear])
def test_a_product_with_a_bias_names_the_product(call):
    x, weight, bias = torch.ones(ROWS, COLS), torch.ones(9, COLS), torch.ones(9)
    found = redline.explain(call, x, weight, bias)
    assert [launch.kernel for launch in found.launches] == ["aten::addmm"]
    assert found.bytes == x.nbytes + weight.nbytes + bias.nbytes + 4 * ROWS * 9
    if call is ops.linear:
        assert found.launches[0].why == "the product is the library's: oneDNN or MKL"


def test_layers_with_biases_name_their_products():
    mlp = redline.layers.LayerNormMLP(8, 16)
    found = redline.explain(mlp, torch.ones(4, 8))
    products = [launch.kernel for launch in found.launches if "mm" in launch.kernel]
    assert products == ["aten::mm", "aten::addmm"]  # fc1's bias is the activation's
    assert not any("copy" in launch.kernel for launch in found.launches)


@devices
def test_a_product_that_is_torchs_says_so(device):
    """cuBLASLt has no float64."""
    wide = torch.ones(4, 4, device=device, dtype=torch.float64)
    (launch,) = redline.explain(torch.ops.redline.gemm, wide, wide).launches
    library = "cuBLAS" if device == "cuda" else "oneDNN or MKL"
    assert launch.kernel == "aten::mm"
    assert launch.why == f"the product is the library's: {library}"


@pytest.mark.parametrize("device", DEVICES[1:])
def test_an_epilogue_that_does_not_fit_is_explained(device):
    gelu = torch.ops.redline.gemm_gelu
    narrow = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    found = redline.explain(gelu, narrow, narrow, bias=narrow[0])
    (launch,) = found.launches
    assert launch.why.endswith("by its heuristic, in its epilogue bias and gelu")
    assert found.fallbacks == ()
    wide = torch.ones(16, 16, device=device)
    found = redline.explain(gelu, wide, wide)
    kernels = [launch.kernel for launch in found.launches]
    assert kernels[0] == "cublasLtMatmul" and any("aten::gelu" in name for name in kernels[1:])
    sentence = (
        "gemm: out: the library's gelu is not exact enough for float32: it runs in steps behind "
        "the product; use a 16-bit dtype"
    )
    assert found.fallbacks == (sentence,)
    with redline.strict(), pytest.raises(RuntimeError) as caught:
        gelu(wide, wide)
    assert str(caught.value).startswith(sentence + " (strict mode)")


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_mask_that_is_not_read_by_vectors_is_explained(device):
    scores = torch.ones(2, 16, 64, device=device, dtype=torch.bfloat16)
    mask = torch.zeros(16, 72, device=device, dtype=torch.bool)
    assert redline.explain(ops.softmax, scores, mask[:, :64]).fallbacks == ()
    assert redline.explain(ops.softmax, scores, mask[:, 4:68]).fallbacks == (
        "softmax: mask: its address is 4 bytes past a multiple of 8: one element per access; give "
        "a tensor with an address of its own, such as a clone",
    )


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize(("count", "kernel"), [(16384, "runs_kernel"), (16385, "rows_kernel")])
def test_the_number_of_tokens_decides_the_sort(device, count, kernel):
    tokens = torch.arange(count, device=device) % 9
    weight = normal(9, COLS, device=device)
    found = redline.explain(ops.embedding, tokens, weight).launches
    first, *_ = [launch for launch in found if launch.direction == "backward"]
    assert first.kernel == kernel and str(count) in first.why
    assert ("by runs" if count == 16384 else "CUB's radix sort") in first.why


@pytest.mark.parametrize("device", DEVICES[1:])
def test_sums_over_rows_walk_down_them(device):
    x, bias = normal(ROWS, COLS, device=device), normal(COLS, device=device)
    found = redline.explain(ops.activation, x, bias).launches
    walk, total = [launch for launch in found if launch.direction == "backward"]
    assert walk.kernel.startswith("column_kernel<")
    assert walk.why.startswith("walk down the rows: column sums of ")
    assert total.why.startswith("partial sums of ")


def test_without_gradients_there_is_no_backward():
    x, weight = norm("cpu", 1)
    with torch.no_grad():
        found = redline.explain(ops.rms_norm, x, weight)
    assert {launch.direction for launch in found.launches} == {"forward"}
    assert found.backward_bytes == 0


@devices
def test_a_copy_is_a_step_and_a_fallback(device):
    """Its bytes count, and the sentence says what to change."""
    x = torch.ones(COLS, ROWS, device=device).t()
    found = redline.explain(ops.rms_norm, x)
    assert found.fallbacks == (
        f"rms_norm: x: sizes [{ROWS}, {COLS}] with strides [1, {ROWS}] are copied to lie side by "
        "side; give it contiguous",
    )
    copied, ours = found.launches
    assert copied.op == copied.kernel == "aten::copy_" and "are copied" in copied.why
    assert ours.op == "rms_norm_forward"
    plain = redline.explain(ops.rms_norm, x.contiguous())
    assert found.bytes == plain.bytes + 2 * x.nbytes


@devices
def test_torchs_kernels_and_the_reference_path_are_told_apart(device):
    q, k, v = (normal(2, 16, 4, 64, device=device, dtype=torch.bfloat16, seed=i) for i in range(3))
    fused = redline.explain(ops.attention, q, k, v, causal=True)
    kernels = [launch.kernel for launch in fused.launches]
    assert sum("_scaled_dot_product_" in kernel for kernel in kernels) == 2, kernels
    assert not any("softmax" in kernel for kernel in kernels) and fused.fallbacks == ()
    masked = redline.explain(ops.attention, q, k, v, causal=True, window=(4, 0))
    assert masked.fallbacks == (
        "attention: window: torch's fused kernels do not serve it: products and a masked softmax "
        "that hold all scores; give none",
    )
    assert "softmax_forward" in [launch.op for launch in masked.launches]
    assert masked.bytes > fused.bytes


@pytest.mark.parametrize("device", DEVICES[1:])
def test_an_unaligned_pointer_is_explained(device):
    x = strided(torch.ones(ROWS, COLS, device=device, dtype=torch.bfloat16))
    (sentence,) = redline.explain(ops.rms_norm, x).fallbacks
    assert sentence == (
        "rms_norm: x: its address is 2 bytes past a multiple of 16: one element per access; give a "
        "tensor with an address of its own, such as a clone"
    )
    with redline.strict(), pytest.raises(RuntimeError) as caught:
        ops.rms_norm(x)
    assert str(caught.value).startswith(sentence + " (strict mode)")


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize(
    ("cols", "why"),
    [
        (64, "a row of 64 columns fits 16 threads of a warp"),
        (4096, "a row of 4096 columns fits one block"),
        (65536, "a row of 65536 columns does not fit one block: cluster of 4"),
    ],
)
def test_the_width_of_a_row_decides(device, cols, why):
    if torch.cuda.get_device_capability()[0] < 9 and cols > 32768:
        pytest.skip("clusters begin with compute capability 9.0")
    x = torch.ones(4, cols, device=device, dtype=torch.bfloat16)
    (launch,) = redline.explain(ops.rms_norm, x).launches
    assert launch.why == why and launch.kernel.startswith("forward_kernel<")
    assert launch.configuration["cluster"] == (4 if cols == 65536 else 1)


def test_the_floor_is_measured_when_asked_for():
    x = torch.ones(4, 8)
    assert redline.explain(ops.rms_norm, x).floor_us is None
    found = redline.explain(ops.rms_norm, x, measure=True)
    assert found.floor_us > 0 and "floor:" in str(found)


def test_it_prints_a_table():
    found = redline.explain(ops.rms_norm, *norm("cpu", 1))
    text = str(found)
    assert text == repr(found)
    for word in ("redline.explain(rms_norm)", "rms_norm_forward", "rms_norm_backward", "chunks"):
        assert word in text
    assert f"bytes: {found.forward_bytes:,} forward, {found.backward_bytes:,} backward" in text


def test_a_function_over_ops_is_explained_step_by_step():
    def twice(x):
        return ops.rms_norm(ops.activation(x))

    found = redline.explain(twice, torch.ones(4, 8))
    assert [launch.op for launch in found.launches] == ["activation_forward", "rms_norm_forward"]


def test_an_error_leaves_nobody_watching():
    with pytest.raises(RuntimeError, match="expected a floating dtype"):
        redline.explain(ops.rms_norm, torch.ones(4, 8, dtype=torch.int64))
    assert redline.explain(ops.rms_norm, torch.ones(4, 8)).fallbacks == ()


def test_inplace_gradients_are_explained_on_a_copy():
    logits = normal(ROWS, COLS, device="cpu")
    scores = logits * 1
    found = redline.explain(ops.cross_entropy, scores, classes("cpu", COLS), inplace_backward=True)
    assert "cross_entropy_gradient_inplace" in [launch.op for launch in found.launches]
    assert torch.equal(scores, logits)
