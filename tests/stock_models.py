"""Small random transformers models of every kind that `tune` knows, and their truth in float64."""

import copy

import torch
import transformers
from torch.overrides import TorchFunctionMode

transformers.logging.set_verbosity_error()

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
# name: (config class, model class, sizes of its own)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 6}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2_SIZES),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
}


def config_of(name, **options):
    kind, _, own = MODELS[name]
    sizes = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    sizes = {**(sizes if name == "gpt2" else SIZES), **own, **options}
    return getattr(transformers, kind)(**sizes)


def build(name, *, dtype=torch.float32, device="cpu", **options):
    """A model in evaluation mode, the same weights on every device; norms are not the identity."""
    torch.manual_seed(0)
    config = config_of(name, **options)
    model = getattr(transformers, MODELS[name][1])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(device=device, dtype=dtype)


def batch(device="cpu", rows=3, tokens=17):
    """Inputs with padding on the left, and labels that ignore it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run(model, **inputs):
    """(logits, loss, gradients by name) of a step."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return out.logits.detach(), out.loss.detach(), gradients


class Widened(TorchFunctionMode):
    """Stock's own code in float64: its steps to float32 go to float64 instead."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return function(*args, **kwargs)


def truth(model, **inputs):
    """`run` of a stock model in float64 on the CPU, from the same numbers."""
    wide = copy.deepcopy(model).cpu().double()
    with Widened():
        return run(wide, **{name: tensor.cpu() for name, tensor in inputs.items()})
