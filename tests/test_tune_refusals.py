"""tune: what it leaves alone, and the sentence that says why."""

import copy
import functools
import importlib
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import redline
from redline.tune import rotary
from redline.tune.plan import plan
from redline.tune.recognise import fingerprint
from redline.tune.swap import Tuned
from stock_models import batch, build, config_of, run

pytestmark = pytest.mark.usefixtures("one_thread")


def warnings_of(model):
    with pytest.warns(UserWarning, match="^tune: ") as warned:
        redline.tune(model)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    return str(warned[0].message).splitlines()


def says(model, name):
    return {part.says for part in plan(model) if part.name == name}


def module_of(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def test_what_is_no_module_is_an_error():
    for function in (redline.tune, redline.untune):
        name = function.__name__.split(".")[-1]
        with pytest.raises(TypeError) as error:
            function({})
        assert str(error.value) == f"{name}: model: expected a torch.nn.Module, not dict"


def test_a_module_without_a_transformers_model():
    assert warnings_of(torch.nn.Linear(2, 2)) == [
        "tune: Linear: no transformers model is in it: left as it is"
    ]


def test_transformers_is_not_imported():
    code = (
        "import sys, warnings, redline, torch; warnings.simplefilter('ignore'); "
        "assert 'redline.tune' not in sys.modules; redline.tune(torch.nn.Linear(2, 2)); "
        "assert 'transformers' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(redline.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_warnings_as_errors_change_nothing():
    model = build("llama")
    model.loss_function = lambda **options: None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="its loss_function was set by hand"):
            redline.tune(model)
    assert not any(isinstance(module, Tuned) for module in model.modules())


class Plain:
    def forward(self, x):
        return x * 2.0


class Dressed:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice x."""
        # It is exact.
        return (x * 2.0)  # fmt: skip


class Other:
    def forward(self, x):
        return x * 2.5


def test_a_fingerprint_is_of_the_arithmetic():
    assert len(fingerprint(Plain.forward)) == 12
    assert fingerprint(Dressed.forward) == fingerprint(Plain.forward)
    assert fingerprint(Other.forward) != fingerprint(Plain.forward)
    assert fingerprint(functools.wraps(Plain.forward)(Other.forward)) != fingerprint(Plain.forward)
    assert fingerprint(len) == fingerprint(Plain) == ""


def test_an_unknown_model_type():
    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    classes = [type(module) for module in model.modules()]
    assert warnings_of(model) == [
        "tune: GPTNeoXForCausalLM: model type gpt_neox is unknown (known: gemma2, gemma3, "
        "gemma3_text, gpt2, llama, mistral, olmo2, phi3, qwen2, qwen3): left as it is"
    ]
    assert [type(module) for module in model.modules()] == classes


def named_like_stock(model):
    class LlamaRMSNorm(torch.nn.Module):
        def forward(self, x):
            return x

    model.model.norm = LlamaRMSNorm()


def below_stock(model):
    class Norm(type(model.model.norm)):
        pass

    model.model.norm.__class__ = Norm


@pytest.mark.parametrize(
    ("replace", "name"),
    [(named_like_stock, "LlamaRMSNorm"), (below_stock, "Norm")],
)
def test_another_class(replace, name):
    model = build("llama")
    replace(model)
    kind = f"test_tune_refusals.{replace.__name__}.<locals>.{name}"
    assert warnings_of(model) == [
        f"tune: {name}: its class is {kind}, not the stock one: left as it is"
    ]
    assert not isinstance(model.model.norm, Tuned)
    assert isinstance(model.model.layers[0].input_layernorm, Tuned)


@pytest.mark.parametrize(
    ("patched", "names"),
    [
        ("LlamaRMSNorm.forward", ["LlamaRMSNorm"]),
        ("LlamaMLP.forward", ["LlamaMLP"]),
        ("apply_rotary_pos_emb", ["LlamaAttention: rotary"]),
        ("rotate_half", ["LlamaAttention: rotary"]),
    ],
)
def test_another_source(patched, names, monkeypatch):
    module = module_of("llama")
    owner = getattr(module, patched.split(".")[0]) if "." in patched else module
    attribute = patched.split(".")[-1]
    stock = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, lambda *args, **options: stock(*args, **options))
    model = build("llama")
    assert warnings_of(model) == [
        f"tune: {name}: the source of {patched} is not one that is known: left as it is"
        for name in names
    ]
    assert not any(isinstance(m, Tuned) for m in model.modules() if type(m).__name__ in names)
    assert isinstance(model.model.norm, Tuned) or "RMSNorm" in patched


@pytest.mark.parametrize("in_force", [False, True])
def test_the_module_that_the_package_kernels_makes_of_a_function(in_force, monkeypatch):
    module = module_of("llama")

    def made(func):
        class Func(torch.nn.Module):
            def forward(self, *args, **options):
                return func(*args, **options)

        Func.__module__ = "kernels.layer"
        return Func()

    function = made(module.apply_rotary_pos_emb)
    if in_force:
        function.forward = lambda *args: args[:2]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", function)
    attention = module.LlamaAttention
    why = "the source of apply_rotary_pos_emb is not one that is known"
    assert rotary.RotaryAttention.recognises(attention) == (why if in_force else None)


def test_another_source_of_the_tables(monkeypatch):
    module = module_of("llama")
    stock = module.LlamaRotaryEmbedding.forward
    monkeypatch.setattr(module.LlamaRotaryEmbedding, "forward", lambda *args: stock(*args))
    model = build("llama")
    assert warnings_of(model) == [
        "tune: LlamaAttention: rotary: its tables come from LlamaRotaryEmbedding, "
        "which is not known: left as it is"
    ]
    assert not isinstance(model.model.rotary_emb, Tuned)


def test_another_source_of_the_loss(monkeypatch):
    loss = transformers.loss.loss_utils
    monkeypatch.setattr(loss, "fixed_cross_entropy", lambda *args, **options: args[0].sum())
    assert warnings_of(build("llama")) == [
        "tune: LlamaForCausalLM: loss: the source of fixed_cross_entropy is not one that is "
        "known: left as it is"
    ]


def test_an_attention_that_does_not_call_the_rotary_embedding(monkeypatch):
    monkeypatch.setattr(module_of("llama").LlamaAttention, "forward", lambda self, x: (x, None))
    assert warnings_of(build("llama")) == [
        "tune: LlamaAttention: rotary: LlamaAttention.forward does not call "
        "apply_rotary_pos_emb: left as it is"
    ]


def test_a_forward_that_was_replaced_on_the_instance():
    model = build("llama", dtype=torch.bfloat16)
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    inputs = batch()
    stock = run(model, **inputs)
    attention.forward = types.MethodType(type(attention).forward, attention)
    norm.forward = types.MethodType(type(norm).forward, norm)
    why = "its forward was replaced on the instance: left as it is"
    assert warnings_of(model) == [
        f"tune: LlamaRMSNorm: {why}",
        f"tune: LlamaAttention: rotary: {why}",
    ]
    assert isinstance(model.model.layers[1].self_attn, Tuned)
    tables = "an attention that was left reads its tables"
    assert says(model, "LlamaRotaryEmbedding") == {tables}
    torch.testing.assert_close(run(model, **inputs)[0], stock[0], rtol=0, atol=2e-2)


def test_tables_from_elsewhere():
    class Angles(torch.nn.Module):
        pass

    model = build("llama")
    model.model.rotary_emb = Angles()
    assert warnings_of(model) == [
        "tune: LlamaAttention: rotary: its tables come from Angles, which is not known: "
        "left as it is"
    ]


def test_a_parameter_that_is_none():
    class Sharded(torch.nn.Parameter):
        pass

    model = build("llama")
    model.model.norm.weight = Sharded(torch.ones(64))
    assert warnings_of(model) == [
        "tune: LlamaRMSNorm: its weight is a Sharded, not a plain parameter: left as it is"
    ]


def test_a_norm_over_two_axes():
    model = build("gpt2")
    model.transformer.ln_f = torch.nn.LayerNorm((17, 64))
    assert warnings_of(model) == [
        "tune: LayerNorm: it normalises (17, 64), more than the last axis: left as it is"
    ]


def test_activations_that_have_no_op():
    assert warnings_of(build("llama", hidden_act="tanh")) == [
        "tune: LlamaMLP: no gated activation is known for Tanh: left as it is"
    ]
    assert warnings_of(build("gemma2", hidden_activation="gelu_python_tanh")) == [
        "tune: Gemma2MLP: no gated activation is known for GELUTanh: left as it is"
    ]
    assert warnings_of(build("gpt2", activation_function="tanh")) == [
        "tune: Tanh: its arithmetic is none that Redline knows: left as it is"
    ]


def test_an_activation_with_hooks():
    model = build("llama")
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    assert warnings_of(model) == [
        "tune: LlamaMLP: its activation has hooks, which a fused op would not call: left as it is"
    ]
    assert isinstance(model.model.layers[0].mlp, Tuned)


def test_a_loss_that_was_set_by_hand():
    model = build("llama")
    model.loss_function = loss = lambda logits, labels, **options: logits.sum()
    assert warnings_of(model) == [
        "tune: LlamaForCausalLM: loss: its loss_function was set by hand: left as it is"
    ]
    assert redline.untune(model).loss_function is loss


def test_a_class_that_has_changed_since():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize = torch.nn.utils.parametrize
    model = redline.tune(build("llama"))
    parametrize.register_parametrization(model.model.norm, "weight", Doubled())
    doubled = copy.deepcopy(model)(**batch()).logits
    assert torch.equal(model(**batch()).logits, doubled)
    with pytest.warns(UserWarning, match="^untune: ") as warned:
        redline.untune(model)
    assert str(warned[0].message) == (
        "untune: ParametrizedLlamaRMSNorm: its class has changed since: left as it is"
    )
    parametrize.remove_parametrizations(model.model.norm, "weight")
    redline.untune(model)
    assert not any(isinstance(module, Tuned) for module in model.modules())


@pytest.mark.filterwarnings("error")
def test_what_is_left_on_purpose_is_said_in_the_table_alone():
    model = build("gpt2", activation_function="gelu_pytorch_tanh")
    redline.tune(model)
    assert says(model, "GELUTanh") == {"one call of torch in stock, which is as fast"}
    assert says(model, "GPT2MLP") == {"not gated; its activation is a part of its own"}
    assert says(model, "GPT2Attention: attention") == {
        "ops.attention is torch's own kernel, nowhere measured faster"
    }
    both = transformers.GPT2DoubleHeadsModel(config_of("gpt2"))
    assert says(redline.tune(both), "GPT2DoubleHeadsModel: loss") == {
        "its forward computes its loss without loss_function"
    }
    olmo = redline.tune(build("olmo2"))
    assert says(olmo, "Olmo2RotaryEmbedding") == {"its tables are float32 in stock"}
