# Over budget: parameters: the signatures are Transformer Engine's.
"""DotProductAttention."""

import os
from contextlib import nullcontext
from functools import partial

import torch

from redline import parallel
from redline.extensions.transformer_engine.extra_state import ExtraState
from redline.extensions.transformer_engine.recompute import checkpoint
from redline.layers.core_attention import core_attention
from redline.megatron.transformer_engine.pytorch.module.base import refuse

SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")


def _deterministic():
    """Megatron's deterministic_mode asks for it by this variable of Transformer Engine's."""
    allowed = os.getenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") != "0"
    return not allowed or torch.are_deterministic_algorithms_enabled()


def _check_built(inference_params, alibi_slopes, num_splits, bias_type):
    layer = "DotProductAttention"
    for name, value, expected in (
        ("inference_params", inference_params, None),
        ("alibi_slopes", alibi_slopes, None),
        ("num_splits", num_splits or 1, 1),
    ):
        if value is not expected and value != expected:
            refuse(layer, name, expected, value, "it is not built")
    if bias_type not in ("no_bias", "post_scale_bias"):
        expected = "no_bias or post_scale_bias"
        refuse(layer, "core_attention_bias_type", expected, bias_type, "give a bias of the scores")


class DotProductAttention(ExtraState):
    """softmax(scale q k^T) v over `redline.layers.core_attention`, of one rank.

    forward(q, k, v) -> [.., heads d] in the layout of q: sbhd, bshd, or thd with cu_seqlens; with
    return_max_logit (out, largest logit of each head). softmax_type off-by-one adds a logit of 0 to
    the denominator, learnable the parameter softmax_offset [heads], float32.
    """

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
    ):
        super().__init__()
        parallel.one_rank("DotProductAttention", tp_group, tp_size)
        groups = num_gqa_groups or num_attention_heads
        if num_attention_heads % groups:
            raise ValueError(
                "transformer_engine.pytorch.DotProductAttention: num_gqa_groups: expected a "
                f"divisor of {num_attention_heads} heads, not {groups}"
            )
        if softmax_type not in SOFTMAX_TYPES:
            raise ValueError(
                "transformer_engine.pytorch.DotProductAttention: softmax_type: expected "
                f"{' '.join(SOFTMAX_TYPES)}, not {softmax_type}"
            )
        self.num_attention_heads, self.num_gqa_groups = num_attention_heads, groups
        self.attention_dropout, self.qkv_format = attention_dropout, qkv_format
        self.attn_mask_type, self.window_size = attn_mask_type, window_size
        self.attention_type, self.layer_number = attention_type, layer_number
        self.sequence_parallel, self.get_rng_state_tracker = False, get_rng_state_tracker
        self.softmax_scale, self.return_max_logit = softmax_scale, return_max_logit
        self.softmax_type, self.cp_comm_type = softmax_type, cp_comm_type
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.softmax_offset = None
        if softmax_type == "learnable":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            offset = torch.zeros(num_attention_heads, dtype=torch.float32, device=device)
            self.softmax_offset = torch.nn.Parameter(offset)

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"):
        for group in cp_group if isinstance(cp_group, list) else [cp_group]:
            if (size := parallel.size_of(group)) > 1:
                refuse("DotProductAttention", "cp_group", "one rank", size, "it is not built")
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type

    def _sink(self, q):
        if self.softmax_type == "vanilla":
            return None
        if self.softmax_type == "learnable":
            return self.softmax_offset
        return torch.zeros(q.shape[-2], dtype=torch.float32, device=q.device)

    def _fork(self, q):
        """The context in which Megatron's tracker gives dropout's numbers."""
        if self.get_rng_state_tracker is None or not q.is_cuda:
            return nullcontext()
        return self.get_rng_state_tracker().fork()

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        num_splits=1,
    ):
        _check_built(inference_params, alibi_slopes, num_splits, core_attention_bias_type)
        packing = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_kv,
            "cu_seqlens_q_padded": cu_seqlens_q_padded,
            "cu_seqlens_k_padded": cu_seqlens_kv_padded,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_kv,
        }
        mask = attn_mask_type or self.attn_mask_type
        options = {
            "layout": qkv_format or self.qkv_format,
            "mask": mask,
            "attention_mask": attention_mask,
            "bias": core_attention_bias,
            "dropout": self.attention_dropout if self.training else 0.0,
            "packing": packing,
            "window": self._window(mask, window_size),
            "scale": self.softmax_scale,
            "sink": self._sink(query_layer),
            "deterministic": _deterministic(),
            "return_max_logit": self.return_max_logit,
        }
        run = partial(checkpoint, core_attention) if checkpoint_core_attention else core_attention
        with self._fork(query_layer) if options["dropout"] else nullcontext():
            return run(query_layer, key_layer, value_layer, **options)

    def _window(self, mask, window):
        """(-1, 0) means nothing without causal: it is what causal alone means."""
        window = self.window_size if window is None else window
        if window is None or ("causal" not in mask and tuple(window) == (-1, 0)):
            return None
        return tuple(window)
