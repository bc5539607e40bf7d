"""The new address's functions: rotary, cross entropy, products, recomputation, generators."""

import copy
import re

import pytest
import torch

import reference
from cases import DEVICES, randn, wide
from megatron_config import configuration
from redline.extensions import transformer_engine as te
from redline.extensions.transformer_engine.cross_entropy import parallel_cross_entropy
from redline.extensions.transformer_engine.gemm import general_gemm
from redline.extensions.transformer_engine.rotary import apply_rotary_pos_emb
from tolerance import assert_close

devices = pytest.mark.parametrize("device", DEVICES)

# --- rotary ---------------------------------------------------------------------------------------

POSITIONS, ROTARY = 12, 6


def angles(interleaved, device="cpu"):
    """freqs [positions, 1, 1, d] as Megatron makes them, and the angle of each pair."""
    pairs = torch.arange(POSITIONS)[:, None] / 10.0 ** torch.arange(ROTARY // 2)
    both = pairs.repeat_interleave(2, -1) if interleaved else torch.cat([pairs, pairs], -1)
    return both[:, None, None].to(device), pairs.double()


def turned(t, pairs, interleaved, offset=0):
    """reference.rotary of a batch [s, b, heads, d] that begins at a position."""
    s, b = t.shape[:2]
    positions = (torch.arange(s) + offset).repeat_interleave(b)
    return reference.rotary(t.flatten(0, 1), pairs.cos(), pairs.sin(), positions, interleaved).view(
        t.shape
    )


@devices
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary(interleaved, device):
    freqs, pairs = angles(interleaved, device)
    t = randn(9, 2, 3, 8, dtype=torch.float32, device=device).requires_grad_()
    y = te.fused_apply_rotary_pos_emb(t, freqs, interleaved=interleaved)
    (t64,) = wide(t)
    y64 = turned(t64, pairs, interleaved)
    assert_close(y.cpu(), y64, roundings=8)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, t, upstream)
    (grad64,) = torch.autograd.grad(y64, t64, upstream.cpu().double())
    assert_close(grad.cpu(), grad64, roundings=8)
    swapped = apply_rotary_pos_emb(t.transpose(0, 1), freqs, "bshd", interleaved=interleaved)
    assert torch.equal(swapped.transpose(0, 1), y)


@devices
def test_rotary_of_packed_sequences(device):
    freqs, pairs = angles(False, device)
    t = randn(10, 3, 8, dtype=torch.float32, device=device)
    bounds = torch.tensor([0, 4, 5, 10], dtype=torch.int32, device=device)
    y = te.fused_apply_rotary_pos_emb_thd(t, bounds, freqs)
    parts = t.cpu().double().split([4, 1, 5])
    expected = torch.cat([turned(part[:, None], pairs, False)[:, 0] for part in parts])
    assert_close(y.cpu(), expected, roundings=8)


def test_rotary_begins_where_it_is_told():
    freqs, pairs = angles(False)
    t, starts = torch.randn(4, 2, 3, 8), torch.tensor([0, 5])
    y = apply_rotary_pos_emb(t, freqs, start_positions=starts)
    for index, start in enumerate(starts.tolist()):
        one = t[:, index : index + 1].double()
        assert_close(y[:, index : index + 1], turned(one, pairs, False, start), roundings=8)


def test_rotary_warns_of_an_argument_without_effect():
    freqs, _ = angles(False)
    with pytest.warns(UserWarning, match="transpose_output_memory has no effect"):
        te.fused_apply_rotary_pos_emb(torch.ones(2, 1, 1, 8), freqs, True)


# --- cross entropy and products -------------------------------------------------------------------


@devices
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing, device):
    logits = randn(5, 2, 33, dtype=torch.bfloat16, device=device).requires_grad_()
    labels = torch.randint(33, (5, 2)).to(device)
    labels[1, 1] = -100
    loss = parallel_cross_entropy(logits, labels, smoothing)
    assert loss.dtype == torch.float32 and loss.shape == labels.shape and loss[1, 1] == 0
    if not smoothing:
        assert torch.equal(te.te_parallel_cross_entropy(logits, labels, None), loss)
    (logits64,) = wide(logits)
    kept = labels.cpu() != -100
    expected = reference.cross_entropy(logits64, labels.cpu().clamp(min=0), smoothing) * kept
    assert_close(loss.cpu(), expected, roundings=16)
    upstream = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    (grad64,) = torch.autograd.grad(expected, logits64, upstream.cpu().double())
    assert_close(grad.cpu(), grad64, torch.bfloat16)
    mean = parallel_cross_entropy(logits, labels, smoothing, reduce_loss=True)
    assert_close(mean.cpu(), expected.sum() / kept.sum(), roundings=16)


@devices
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
def test_gemm(layout, out_dtype, device):
    x = randn(3, 4, 8, dtype=torch.bfloat16, device=device)
    y_grad = randn(3, 4, 6, dtype=torch.bfloat16, device=device, seed=1)
    weight = randn(6, 8, dtype=torch.bfloat16, device=device, seed=2)
    a, b = {"TN": (weight, x), "NN": (weight, y_grad), "NT": (x, y_grad)}[layout]
    out = te.te_general_gemm(a, b, out_dtype, layout)[0]
    x64, y64, w64 = (t.cpu().double() for t in (x, y_grad, weight))
    truth = {"TN": x64 @ w64.T, "NN": y64 @ w64, "NT": y64.flatten(0, 1).T @ x64.flatten(0, 1)}
    assert out.dtype == (out_dtype or torch.bfloat16)
    assert_close(out.cpu(), truth[layout], sums=8)


@devices
def test_gemm_with_bias_and_buffer(device):
    x = randn(4, 8, dtype=torch.bfloat16, device=device)
    weight = randn(6, 8, dtype=torch.bfloat16, device=device, seed=2)
    y_grad = randn(4, 6, dtype=torch.bfloat16, device=device, seed=1)
    bias = randn(6, dtype=torch.float32, device=device)
    out, bias_grad, *rest = te.te_general_gemm(weight, x, torch.float32, bias=bias)
    truth = x.cpu().double() @ weight.cpu().double().T + bias.cpu().double()
    assert_close(out.cpu(), truth, sums=8)
    assert bias_grad is None and rest == [None, None]
    buffer = torch.ones(6, 8, device=device)
    into = {"out": buffer, "bias": bias, "grad": True, "layout": "NT"}
    for count, accumulate in ((0, False), (1, True)):
        out, bias_grad, *_ = general_gemm(x, y_grad, accumulate=accumulate, **into)
        product = y_grad.cpu().double().T @ x.cpu().double()
        assert out is buffer
        assert_close(buffer.cpu(), (count + 1) * product, sums=8)
    assert_close(bias_grad.cpu(), y_grad.cpu().double().sum(0), sums=8)


# --- recomputation, generators, offloading, splitting ---------------------------------------------


def region(layer):
    def run(x, scale=1.0):
        return torch.nn.functional.dropout(layer(x) * scale, 0.5)

    return run


def gradients(run, layer, x):
    torch.manual_seed(5)
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("tracked", [False, True], ids=["default", "tracker"])
def test_checkpoint_draws_the_same_numbers(tracked):
    tracker = te.TECudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 7)
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    inner, calls = region(layer), []

    def function(x, scale):
        calls.append(1)
        if not tracked:
            return inner(x, scale)
        with tracker.fork():
            return inner(x, scale)

    states = copy.deepcopy(tracker.get_states())
    plain = gradients(lambda x: function(x, 2.0), layer, x)
    tracker.set_states(states)
    calls.clear()
    getter = (lambda: tracker) if tracked else None
    kept = gradients(
        lambda x: te.te_checkpoint(function, True, getter, None, x, scale=2.0), layer, x
    )
    assert len(calls) == 2
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)


def test_checkpoint_leaves_the_tracker_where_forward_left_it():
    tracker = te.TECudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 7)
    x = torch.randn(4, requires_grad=True)

    def function(x):
        with tracker.fork():
            return torch.nn.functional.dropout(x, 0.5)

    y = te.te_checkpoint(function, False, lambda: tracker, None, x)
    after = tracker.get_states()["model-parallel-rng"].clone()
    y.sum().backward()
    assert torch.equal(tracker.get_states()["model-parallel-rng"], after)


def test_tracker():
    device = "cuda" if torch.cuda.is_available() else "cpu"  # whose generator the tracker holds
    state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    tracker = te.TECudaRNGStatesTracker(is_inference_rng_tracker=True)
    assert not tracker.is_initialized() and tracker.is_inference_rng_tracker
    tracker.add("model-parallel-rng", 3)
    tracker.add("other", 4)
    assert tracker.is_initialized() and set(tracker.get_states()) == {"model-parallel-rng", "other"}
    before, drawn = state(), []
    for name in (("model-parallel-rng",), ("other",), ()):
        with tracker.fork(*name):
            drawn.append(torch.randn(4, device=device))
    assert torch.equal(state(), before)
    generator = torch.Generator(device).manual_seed(3)
    assert torch.equal(drawn[0], torch.randn(4, generator=generator, device=device))
    assert torch.equal(drawn[2], torch.randn(4, generator=generator, device=device))
    assert not torch.equal(drawn[0], drawn[1])
    tracker.reset()
    assert not tracker.is_initialized() and not tracker.get_states()
    tracker.set_states({"a": before})
    assert tracker.is_initialized()


@pytest.mark.parametrize(
    ("name", "seed", "what"), [("a", 9, "name: .* not a$"), ("b", 3, "seed: .* not 3$")]
)
def test_tracker_refuses_what_is_taken(name, seed, what):
    tracker = te.TECudaRNGStatesTracker()
    tracker.add("a", 3)
    with pytest.raises(RuntimeError, match=f"^TECudaRNGStatesTracker: {what}"):
        tracker.add(name, seed)
    with pytest.raises(KeyError, match="name: expected one that was added, not b"):
        tracker.fork("b").__enter__()


def test_split():
    x = torch.randn(4, 6, requires_grad=True)
    parts = te.SplitAlongDim(x, 1, [1, 3, 2])
    assert [part.shape[1] for part in parts] == [1, 3, 2]
    assert parts[1].data_ptr() == x[:, 1:].data_ptr()
    assert te.SplitAlongDim(x, 0, 1, True)[0].shape == (6,)
    upstream = [torch.randn_like(part) for part in parts]
    assert torch.equal(torch.autograd.grad(parts, x, upstream)[0], torch.cat(upstream, 1))


@devices
def test_offload(device):
    layers = [torch.nn.Linear(8, 8, device=device) for _ in range(3)]
    x = randn(4, 8, dtype=torch.float32, device=device).requires_grad_()
    grads = []
    for enabled in (False, True):
        context, sync = te.get_cpu_offload_context(enabled, 2, 3)
        y = x
        for _ in range(2):  # two steps: the count begins anew
            y = x
            for layer in layers:
                with context:
                    y = layer(y).tanh()
                y = sync(y)
        parameters = [p for layer in layers for p in layer.parameters()]
        grads.append(torch.autograd.grad(y.sum(), [x, *parameters]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_offload_that_is_off_refuses_nothing():
    context, sync = te.get_cpu_offload_context(False, 1, 2, True, True)
    with context:
        assert sync(3) == 3
    context, _ = te.get_cpu_offload_context(True, 1, 2, False)
    with context:
        torch.ones(2, requires_grad=True).exp().sum().backward()


def test_offload_copies_activations_of_the_first_layers_alone():
    context, sync = te.get_cpu_offload_context(True, 1, 2)
    weight, x = torch.nn.Parameter(torch.ones(3, 3)), torch.ones(2, 3, requires_grad=True)
    x = x * 1.0
    assert isinstance(context.pack(weight), torch.nn.Parameter)
    assert context.pack(weight.t()).data_ptr() == weight.data_ptr()
    assert isinstance(context.pack(x), tuple)
    sync(x)
    assert context.pack(x) is x
    sync(x)
    assert isinstance(context.pack(x), tuple)


# --- quantised training ---------------------------------------------------------------------------


def test_quantisation_types_read_their_configuration():
    kind = te.TransformerEngineConfigType.TEQuantizationParams.value
    assert kind == "TEQuantizationParams"
    recipe = {"fp8_quantization_recipe": "mxfp8", "fp8_format": "e4m3"}
    given = {"transformer_engine_config_type": kind, "training_recipe": recipe}
    read = te.TEQuantizationParams.parse_from_config(given)
    assert read.training_recipe == te.TEQuantizationRecipe(fp8_quantization_recipe="mxfp8")
    assert read.evaluation_recipe is None
    assert "override_quantized_autocast" in te.TEQuantizationRecipe.get_config_keys()
    custom = {"fp4_quantization_recipe": "custom", "custom_recipe_factory": "a.b"}
    assert te.TEQuantizationRecipe.parse_from_config(custom).custom_recipe_factory == "a.b"


RECIPE = "TEQuantizationRecipe"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"format": 1}, r"TEQuantizationRecipe: expected keys of \[.*\], not \['format'\]"),
        (
            {"fp8_quantization_recipe": "delayed"},
            f"{RECIPE}: fp8_quantization_recipe: expected one that a module can have alone, "
            "not delayed",
        ),
        (
            {"fp8_quantization_recipe": "mxfp8", "fp4_quantization_recipe": "nvfp4"},
            f"{RECIPE}: expected a recipe of FP8 or of FP4, not both: mxfp8, nvfp4",
        ),
        (
            {"fp8_quantization_recipe": "custom"},
            f"{RECIPE}: custom_recipe_factory: expected one beside custom, not none",
        ),
    ],
)
def test_quantisation_recipes_that_do_not_fit(given, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        te.TEQuantizationRecipe.parse_from_config(given)


def test_quantisation_params_that_do_not_fit():
    parse = te.TEQuantizationParams.parse_from_config
    with pytest.raises(ValueError, match=r"transformer_engine_config_type: expected .*, not None"):
        parse({"training_recipe": {}})
    kind = {"transformer_engine_config_type": "TEQuantizationParams"}
    with pytest.raises(ValueError, match=r"expected training_recipe .*, not \['recipe'\]"):
        parse(kind | {"recipe": {}})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: te.TEDelayedScaling(configuration(), None),
            "TEDelayedScaling: products in FP8 are not built; bfloat16 works: leave fp8 unset",
        ),
        (
            lambda: te.TELMHeadColumnParallelLinear(8, 8),
            "TELMHeadColumnParallelLinear: products in MXFP8 are not built; "
            "TEColumnParallelLinear works",
        ),
        (
            lambda: te.TEFusedMLPWithGroupedLinear(configuration(), None),
            "TEFusedMLPWithGroupedLinear: products in MXFP8 are not built; TEFusedMLP works",
        ),
        (
            lambda: te.te_general_gemm(torch.ones(2, 2).to(torch.float8_e4m3fn), torch.ones(2, 2)),
            "te_general_gemm: A: expected a plain floating dtype, not torch.float8_e4m3fn; "
            "quantised products are not built; bfloat16 works: leave it unset",
        ),
        (
            lambda: te.get_cpu_offload_context(True, 1, 1, True, True),
            "get_cpu_offload_context: weight_offloading: expected False, not True; "
            "offloading of weights is not built; that of activations works",
        ),
        (
            lambda: te.fused_apply_rotary_pos_emb_thd(torch.ones(1, 1, 8), None, None, cp_size=2),
            "fused_apply_rotary_pos_emb: cp_size: expected 1, not 2; "
            "more ranks are not built; one rank works",
        ),
    ],
)
def test_what_is_not_built_says_so(call, sentence):
    with pytest.raises(NotImplementedError, match=f"^{re.escape(sentence)}$"):
        call()


def test_wrong_angles_and_layouts():
    with pytest.raises(ValueError, match=r"freqs: expected \[positions, 1, 1, rotary_dim\], not"):
        te.fused_apply_rotary_pos_emb(torch.ones(2, 1, 1, 8), torch.ones(2, 8))
    with pytest.raises(
        ValueError, match="te_general_gemm: layout: expected TN or NN or NT, not TT"
    ):
        te.te_general_gemm(torch.ones(2, 2), torch.ones(2, 2), layout="TT")
