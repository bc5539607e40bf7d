"""tune: what a tuned model must survive: copies, files, generation, PEFT, compilers, trainers."""

import copy
import pickle

import pytest
import torch
import transformers

import redline
from cases import DEVICES
from redline.tune.swap import Tuned
from stock_models import MODELS, batch, build, run

pytestmark = pytest.mark.usefixtures("one_thread")


def tuned(model):
    return sum(isinstance(module, Tuned) for module in model.modules())


def same(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2].keys() == theirs[2].keys()
    assert all(torch.equal(gradient, theirs[2][key]) for key, gradient in ours[2].items())


def run_wrapped(model, inputs):
    """`run` of a module that holds the model, its gradients under the model's own names."""
    logits, loss, gradients = run(model, **inputs)
    return logits, loss, {key.split(".", 1)[1]: value for key, value in gradients.items()}


def through_pickle(model, path):
    return pickle.loads(pickle.dumps(model))


def through_deepcopy(model, path):
    return copy.deepcopy(model)


def through_torch_save(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


@pytest.mark.parametrize("through", [through_pickle, through_deepcopy, through_torch_save])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_copy_is_tuned_and_gives_the_same_bits(name, through, tmp_path):
    model = redline.tune(build(name))
    copied = through(model, tmp_path)
    assert tuned(copied) == tuned(model) > 0
    same(run(copied, **batch()), run(model, **batch()))
    assert tuned(redline.untune(copied)) == 0
    assert tuned(model) > 0


def test_a_pickle_is_loaded_as_stock_where_the_source_has_changed(monkeypatch):
    model = redline.tune(build("llama"))
    pickled = pickle.dumps(model.model.norm)
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(norm, "forward", lambda self, x: x)
    with pytest.warns(UserWarning, match="^tune: ") as warned:
        loaded = pickle.loads(pickled)
    assert str(warned[0].message) == (
        "tune: the source of LlamaRMSNorm.forward is not one that is known: "
        "loaded as the stock part"
    )
    assert type(loaded) is norm


def test_moving_to_another_type_moves_what_is_computed():
    model = redline.tune(build("qwen3")).to(torch.bfloat16)
    inputs = batch()
    moved = model(**inputs)
    again = redline.tune(build("qwen3", dtype=torch.bfloat16))(**inputs)
    assert torch.equal(moved.logits, again.logits)


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_writes_what_stock_writes(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "stock")
    redline.tune(model).save_pretrained(tmp_path / "tuned")
    for path in (tmp_path / "stock").iterdir():
        assert (tmp_path / "tuned" / path.name).read_bytes() == path.read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    assert type(loaded) is type(model)
    assert tuned(loaded) == 0
    inputs = batch()
    assert torch.equal(redline.tune(loaded)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_generate_with_a_cache_gives_stocks_tokens(name, device):
    model = build(name, device=device)
    inputs = {key: batch(device)[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(**inputs, **options)
    assert torch.equal(redline.tune(model).generate(**inputs, **options), stock)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), stock)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2"])
def test_gradient_checkpointing_gives_the_same_bits(name, reentrant):
    model = redline.tune(build(name)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = run(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    same(run(model, **batch()), plain)


def test_hooks_are_called_as_before():
    model = build("llama")
    called = []
    for key, module in model.named_modules():
        if key.endswith(("norm", "self_attn", "mlp", "down_proj", "rotary_emb")):
            module.register_forward_hook(lambda *_, key=key: called.append(key))
    inputs = batch()
    model(**inputs)
    stock = called.copy()
    called.clear()
    out = redline.tune(model)(**inputs, output_hidden_states=True)
    assert called == stock
    assert len(out.hidden_states) == 3


LORA = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def lora(model):
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(3)
    names = ["c_attn", "c_fc"] if model.config.model_type == "gpt2" else "all-linear"
    config = peft.LoraConfig(**LORA, target_modules=names, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_lora_before_and_after_is_the_same(name):
    inputs = batch()
    stock = run(lora(build(name)), **inputs)
    before = redline.tune(lora(build(name)))
    after = lora(redline.tune(build(name)))
    same(run(before, **inputs), run(after, **inputs))
    ours = run(before, **inputs)
    assert ours[2].keys() == stock[2].keys()
    assert all("lora_" in key for key in ours[2])
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)
    merged = after.merge_and_unload()
    assert tuned(merged) == tuned(before) > 0
    torch.testing.assert_close(merged(**inputs).logits, stock[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_compile_without_a_graph_break_gives_what_eager_gives(name, device):
    torch._dynamo.reset()
    behind = "aot_eager" if name in ("llama", "gemma3") else "eager"  # a fifth of the time
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(behind)(graph, inputs)

    model = redline.tune(build(name, device=device))
    inputs = batch(device)
    eager = run(model, **inputs)
    compiled = run_wrapped(torch.compile(model, fullgraph=True, backend=backend), inputs)
    if device == "cpu":
        same(compiled, eager)
    else:  # the backward of torch's attention gives other bits in every run
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert targets.count("redline.rotary_pair") == (0 if name == "gpt2" else 2)
    assert targets.count("redline.cross_entropy") == 1


def test_export_holds_the_tuned_parts():
    model = redline.tune(build("llama"))
    inputs = {key: batch()[key] for key in ("input_ids", "attention_mask")} | {"use_cache": False}
    program = torch.export.export(model, (), inputs, strict=False)
    assert torch.equal(program.module()(**inputs).logits, model(**inputs).logits)
    assert sum("redline.rotary_pair" in str(node.target) for node in program.graph.nodes) == 2


def test_trainer_learns_as_with_stock(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate")
    torch.manual_seed(0)
    text = torch.randint(3, 20, (80, 16))
    rows = [{"input_ids": row, "labels": row} for row in text]
    losses = []
    for tune in (lambda model: model, redline.tune):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=20,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        model = tune(build("llama"))
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    stock, ours = map(torch.tensor, losses)
    assert len(ours) == 20
    assert ours[-1] < 0.8 * ours[0]
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-3)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["before", "after"])
def test_sharding_gives_the_same_bits_where_it_leaves_the_weights_whole(order, group):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    alone = run(redline.tune(build("llama")), **batch())
    model = build("llama")
    if order == "before":
        redline.tune(model)
    for part in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    if order == "after":
        with pytest.warns(UserWarning, match="LlamaRMSNorm: its weight is a DTensor"):
            redline.tune(model)
    logits, loss, _ = run(model, **batch())
    torch.testing.assert_close((logits, loss), alone[:2])
    assert tuned(model) == (10 if order == "before" else 5)


def test_device_hooks_are_called_around_the_tuned_parts():
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    model = redline.tune(build("llama"))
    plain = model(**batch()).logits
    hooks.attach_align_device_hook(model, execution_device="cpu")
    assert "forward" in vars(model.model.norm)
    assert torch.equal(model(**batch()).logits, plain)


def test_data_parallel_gives_the_same_bits(group):
    model = redline.tune(build("llama"))
    alone = run(model, **batch())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    same(run_wrapped(parallel, batch()), alone)
    redline.untune(parallel)
    assert tuned(model) == 0
    assert tuned(redline.tune(parallel)) > 0
