"""tune: what becomes of each model, and its arithmetic held to float64."""

import copy
from collections import Counter

import pytest
import torch
import transformers

import redline
from cases import DEVICES, DTYPES
from redline.dyno.measure import saved_bytes
from redline.tune import cross_entropy, rotary
from redline.tune.plan import plan
from redline.tune.savings import bytes_per_token
from redline.tune.swap import Tuned
from stock_models import MODELS, batch, build, run, truth
from tolerance import UNIT_ROUNDOFF, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

RMS, PAIR = "ops.rms_norm", "ops.gated_activation_pair"
TABLES = "float32 cos and sin, once per model"
# What two layers become: (norms, their number, MLP, rotary tables).
BECOMES = {
    "llama": (RMS, 5, PAIR, TABLES),
    "mistral": (RMS, 5, PAIR, TABLES),
    "qwen2": (RMS, 5, PAIR, TABLES),
    "qwen3": (RMS, 9, PAIR, TABLES),
    "gemma2": (RMS + ", zero_centered", 9, PAIR, TABLES),
    "gemma3": (RMS + ", zero_centered", 13, PAIR, TABLES),
    "phi3": (RMS, 5, "ops.gated_activation", TABLES),
    "olmo2": (RMS, 9, PAIR, None),  # whose tables are float32 in stock
}


def no_worse(ours, stock, true, dtype):
    """Within twice stock's error, or one rounding."""
    ours, stock, true = ours.cpu(), stock.cpu(), true.cpu()
    bound = max(2 * relative_error(stock, true), UNIT_ROUNDOFF[dtype])
    return relative_error(ours, true) <= bound


def token_losses(logits, labels):
    """Of each token that counts, in float64."""
    shifted = logits[:, :-1].double().cpu().flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        shifted, labels[:, 1:].cpu().flatten(), reduction="none"
    )


def mean_error_and_bound(ours, stock, true, labels, dtype):
    """A mean is one number, whose error may be none by luck: held to twice that of stock's terms,
    by the root of their mean square, which the mean's cannot pass, or to four float32 roundings:
    the logarithm of the sum, the logit's difference to it, the sum over tokens, their number."""
    terms = [token_losses(result[0], labels) for result in (stock, true)]
    stock_error = max(relative_error(*terms), relative_error(stock[1].cpu(), true[1]))
    roundings = max(UNIT_ROUNDOFF[dtype], 4 * UNIT_ROUNDOFF[torch.float32])
    return relative_error(ours[1].cpu(), true[1]), max(2 * stock_error, roundings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_as_close_to_float64_as_stock(name, dtype, device):
    model = build(name, dtype=DTYPES[dtype], device=device)
    inputs = batch(device)
    seen = inputs["attention_mask"].bool().cpu()
    true = truth(model, **inputs)
    stock = run(model, **inputs)
    ours = run(redline.tune(model), **inputs)
    assert no_worse(*(result[0].cpu()[seen] for result in (ours, stock, true)), DTYPES[dtype])
    error, bound = mean_error_and_bound(ours, stock, true, inputs["labels"], DTYPES[dtype])
    assert error <= bound
    assert ours[2].keys() == true[2].keys()
    for key, gradient in ours[2].items():
        assert no_worse(gradient, stock[2][key], true[2][key], DTYPES[dtype]), key


YARN = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("rope", [YARN, LONG, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_scaled_rotary_embeddings(rope):
    rope = rope | {"rope_theta": 100.0, "original_max_position_embeddings": 16}
    model = build("llama", rope_parameters=rope)
    inputs = batch(tokens=24)
    true, stock = truth(model, **inputs), run(model, **inputs)
    ours = run(redline.tune(model), **inputs)
    assert isinstance(model.model.rotary_emb, Tuned)
    for key, gradient in ours[2].items():
        assert no_worse(gradient, stock[2][key], true[2][key], torch.float32), key


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MODELS)
def test_every_part_that_is_known_is_swapped(name):
    model = redline.tune(build(name))
    parts = Counter(type(module).op for module in model.modules() if isinstance(module, Tuned))
    if name == "gpt2":
        assert parts == {"ops.layer_norm": 5, "ops.activation": 2}
    else:
        norm, norms, mlp, tables = BECOMES[name]
        once = {tables: 1} if tables else {}
        assert parts == {norm: norms, mlp: 2, "ops.rotary_pair": 2, **once}
    assert model.loss_function is cross_entropy.causal_lm_loss


@pytest.mark.parametrize("name", MODELS)
def test_only_classes_change_and_untune_changes_them_back(name):
    model = build(name)
    inputs = batch()
    classes = [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    state = {key: value.data_ptr() for key, value in model.state_dict(keep_vars=True).items()}
    before = run(model, **inputs)
    assert redline.tune(model) is model
    assert all(map(isinstance, model.modules(), classes))
    assert [type(m).__name__ for m in model.modules()] == [kind.__name__ for kind in classes]
    tuned = model.state_dict(keep_vars=True)
    assert [(key, value.data_ptr()) for key, value in tuned.items()] == list(state.items())
    assert redline.untune(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [vars(module).keys() for module in model.modules()] == [a.keys() for a in attributes]
    after = run(model, **inputs)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert all(torch.equal(after[2][key], value) for key, value in before[2].items())


def test_tuning_twice_is_tuning_once():
    model = redline.tune(build("llama"))
    classes = [type(module) for module in model.modules()]
    assert {part.says for part in plan(model) if "attention" not in part.name} == {"tuned already"}
    redline.tune(model)
    assert [type(module) for module in model.modules()] == classes
    redline.untune(model)
    assert not any(isinstance(module, Tuned) for module in model.modules())


def test_dry_run_prints_the_table_and_changes_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    model = build("llama", dtype=torch.bfloat16)
    attributes = copy.copy(vars(model))
    assert redline.tune(model, dry_run=True) is model
    assert not any(isinstance(module, Tuned) for module in model.modules())
    assert vars(model) == attributes
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "redline.tune, LlamaForCausalLM" in printed
    for row in (
        "LlamaForCausalLM: loss 1 ops.cross_entropy 500",  # 4 · vocabulary - 12
        "LlamaRMSNorm 5 ops.rms_norm 1,280",  # of each: 4 · hidden
        "LlamaMLP 2 ops.gated_activation_pair 384",  # of each: 2 · intermediate
        "backward keeps 2,164 bytes per token less than stock",
    ):
        assert row in printed


@pytest.mark.parametrize("name", MODELS)
def test_a_step_keeps_as_much_less_as_the_table_says(name):
    model = build(name, dtype=torch.bfloat16)
    inputs = batch(rows=4, tokens=64)
    table = sum(bytes_per_token(part.example()) for part in plan(model) if part.example)
    kept = [
        saved_bytes(lambda model=each: model(**inputs), each.parameters())
        for each in (model, redline.tune(copy.deepcopy(model)))
    ]
    saved = (kept[0] - kept[1]) / inputs["input_ids"].numel()
    logits = 2 * 128  # the table takes them for the caller's
    assert abs(saved + logits - table) < 0.12 * table


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2"])
def test_autocast_gives_the_types_that_stock_gives(name, dtype, device):
    model = build(name, dtype=dtype, device=device)
    inputs = batch(device)
    types = []
    for each in (model, redline.tune(copy.deepcopy(model))):
        seen = {}
        for key, module in each.named_modules():
            if key.endswith(("norm", "mlp", "ln_1", "ln_2", "ln_f")):
                module.register_forward_hook(
                    lambda module, args, y, key=key, seen=seen: seen.update({key: y.dtype})
                )
        with torch.autocast(device, torch.bfloat16):
            out = each(**inputs)
        out.loss.backward()
        types.append(seen | {"logits": out.logits.dtype, "loss": out.loss.dtype})
    assert types[0] == types[1]


@pytest.mark.parametrize("weight", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2"])
def test_a_norm_of_another_type_than_its_input_gives_the_type_that_stock_gives(name, weight):
    model = build(name).model
    norm = model.norm.to(weight)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 64, dtype=dtype)
        redline.untune(model)
        stock = norm(x)
        redline.tune(model)
        assert norm(x).dtype == stock.dtype
        assert relative_error(norm(x), stock) < 2e-2


@pytest.mark.parametrize("count", [None, 40, torch.tensor(40)])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_takes_what_stock_takes(count, shifted):
    stock = build("llama").loss_function
    logits = torch.randn(2, 9, 32)
    labels = torch.randint(0, 32, (2, 9))
    labels[0, :3] = 7
    options = {"num_items_in_batch": count, "ignore_index": 7, "unused": 1}
    if shifted:
        options["shift_labels"] = labels
    ours = cross_entropy.causal_lm_loss(logits, labels, 32, **options)
    torch.testing.assert_close(ours, stock(logits, labels, 32, **options))


def test_rotary_takes_heads_on_either_side_and_a_table_row_per_token():
    module = transformers.models.llama.modeling_llama
    q, k = torch.randn(3, 4, 5, 16), torch.randn(3, 2, 5, 16)
    for rows in (1, 3):
        angles = torch.randn(rows, 5, 8).repeat(1, 1, 2)
        tables = angles.cos(), angles.sin()
        stock = module.apply_rotary_pos_emb(q, k, *tables)
        torch.testing.assert_close(rotary.apply_rotary_pos_emb(q, k, *tables), stock)
        turned = rotary.apply_rotary_pos_emb(
            q.transpose(1, 2), k.transpose(1, 2), *tables, unsqueeze_dim=2
        )
        torch.testing.assert_close(tuple(x.transpose(1, 2) for x in turned), stock)
