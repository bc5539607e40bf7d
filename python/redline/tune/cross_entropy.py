"""The loss: logits are read in their own type, where stock first copies them to float32."""
# Over budget: parameters: the signature is transformers' ForCausalLMLoss.

from functools import partial

import torch

from redline import ops
from redline.tune.recognise import Owner, calls, unknown_source
from redline.tune.savings import TOKENS, Example
from redline.tune.swap import ALREADY, Part, left

LOSS = "ForCausalLMLoss"
KNOWN = ((LOSS, "7ee89223cde1"), ("fixed_cross_entropy", "07e688bb7fd4"))


def causal_lm_loss(
    logits,
    labels,
    vocab_size,
    num_items_in_batch=None,
    ignore_index=-100,
    shift_labels=None,
    **kwargs,
):
    """transformers' ForCausalLMLoss by redline.ops.cross_entropy: the next token's cross entropy.

    logits: [..., seq, vocab_size]; labels: [..., seq], shifted here, or `shift_labels`, as they
    are. The mean over the labels that are not `ignore_index`, or their sum divided by
    `num_items_in_batch`. float32.
    """
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.cross_entropy(logits.reshape(-1, vocab_size), targets, reduction, ignore_index)
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def parts(owner: Owner) -> list[Part]:
    model = owner.model
    if model.get_output_embeddings() is None:
        return []
    part = _loss(model)
    part.name = f"{type(model).__name__}: loss"
    return [part]


def _loss(model) -> Part:
    loss = getattr(model, "loss_function", None)
    if loss is causal_lm_loss:
        return left(model, ALREADY, expected=True)
    if "_loss_function" in vars(model):
        return left(model, "its loss_function was set by hand")
    name = getattr(loss, "__name__", type(loss).__name__)
    if name != LOSS:
        return left(model, f"its loss is {name}", expected=True)
    forwards = [vars(kind).get("forward") for kind in type(model).__mro__]
    if not any(calls(forward, "loss_function") for forward in forwards):
        return left(model, "its forward computes its loss without loss_function", expected=True)
    unknown = unknown_source({**loss.__globals__, LOSS: loss}, KNOWN)
    if unknown:
        return left(model, f"the source of {unknown} is not one that is known")
    swap = partial(setattr, model, "loss_function", causal_lm_loss)
    return Part("", "ops.cross_entropy", swap, example=partial(_example, model, loss))


def restore(model) -> None:
    if vars(model).get("_loss_function") is causal_lm_loss:
        del model._loss_function


def _example(model, loss):
    vocabulary = model.config.get_text_config().vocab_size
    meta = {"device": "meta"}
    logits = torch.empty(1, TOKENS, vocabulary, dtype=model.dtype, **meta, requires_grad=True)
    labels = torch.empty(1, TOKENS, dtype=torch.int64, **meta)
    calls = (partial(call, vocab_size=vocabulary) for call in (loss, causal_lm_loss))
    return Example(*calls, (logits, labels), (logits,))  # logits: the caller holds them too
