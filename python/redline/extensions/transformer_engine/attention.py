# Over budget: parameters: the signatures are Megatron's.
"""TEDotProductAttention: core attention as Megatron's attention calls it."""

import torch

from redline.extensions.transformer_engine.extra_state import ExtraState
from redline.extensions.transformer_engine.module import factory_of, fork, option, sharded
from redline.extensions.transformer_engine.refusals import ONE_RANK, check, refuse
from redline.extensions.transformer_engine.table import works
from redline.layers.core_attention import core_attention

SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")
PACKED_MASKS = {"causal": "padding_causal", "no_mask": "padding"}


def _window(config, layer_number):
    """config.window_size on the layers that window_attn_skip_freq leaves windowed (from 1)."""
    window, skip = option(config, "window_size"), option(config, "window_attn_skip_freq")
    if window is None or skip is None:
        return window
    windowed = layer_number % skip if isinstance(skip, int) else skip[layer_number - 1]
    return window if windowed else None


def _packing(params):
    """ops.attention's arguments for sequences packed into one."""
    fields = {
        "cu_seqlens_q": "cu_seqlens_q",
        "cu_seqlens_k": "cu_seqlens_kv",
        "cu_seqlens_q_padded": "cu_seqlens_q_padded",
        "cu_seqlens_k_padded": "cu_seqlens_kv_padded",
        "max_seqlen_q": "max_seqlen_q",
        "max_seqlen_k": "max_seqlen_kv",
    }
    return {ours: option(params, theirs) for ours, theirs in fields.items()}


@works(
    "`attention`; a bias, dropout, an arbitrary mask: a composition with `softmax`",
    "dropout or a bias beside packed sequences; causal with unequal lengths; splits of the keys",
)
class TEDotProductAttention(ExtraState):
    """softmax(scale q k^T + bias) v: q [s, b, heads, d], k, v [s, b, groups, d] -> [s, b, heads d].

    Packed (packed_seq_params.qkv_format "thd"): [t, heads, d] -> [t, heads d]. softmax_type
    learnable has the parameter softmax_offset [heads], float32: a logit in the denominator alone;
    off-by-one is the same with 0. Layer scaling of q k^T cancels and is left out.
    """

    cp_stream = None

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        k_channels=None,
        v_channels=None,
        num_splits=None,
        cp_comm_type="p2p",
        pg_collection=None,
    ):
        super().__init__()
        name = type(self).__name__
        check(name, config)
        refuse(name, "attention_type", attention_type, ("self", "cross"))
        refuse(name, "num_splits", num_splits, (None, 1))
        self.softmax_type = option(config, "softmax_type", "vanilla")
        refuse(name, "softmax_type", self.softmax_type, SOFTMAX_TYPES)
        self.config, self.layer_number = config, layer_number
        self.attn_mask_type, self.softmax_scale = attn_mask_type, softmax_scale
        self.tp_group = self._tp_group = option(pg_collection, "tp")
        self.window = _window(config, layer_number)
        dropout = option(config, "attention_dropout", 0.0)
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout
        clipped = option(config, "qk_clip", False)
        self.return_max_logit = clipped or option(config, "log_max_attention_logit", False)
        self.current_max_attn_logits = None
        if self.softmax_type == "learnable":
            self._make_offset()

    def _make_offset(self):
        heads, device = self.config.num_attention_heads, factory_of(self.config)["device"]
        zeros = torch.zeros(heads, dtype=torch.float32, device=device)
        self.softmax_offset = torch.nn.Parameter(zeros)
        self.softmax_offset.tensor_model_parallel = True
        self.softmax_offset.partition_dim, self.softmax_offset.partition_stride = 0, 1

    def _sink(self, query):
        if self.softmax_type == "vanilla":
            return None
        if self.softmax_type == "learnable":
            return self.softmax_offset
        return torch.zeros(query.shape[-2], dtype=torch.float32, device=query.device)

    def _mask(self, given, packed, queries):
        """The mask's name; the decoding of one query in a window counts from its last key."""
        mask = getattr(given or self.attn_mask_type, "name", given or self.attn_mask_type)
        if packed:
            return PACKED_MASKS.get(mask, mask)
        if mask == "no_mask" and self.window is not None and queries == 1:
            return "causal_bottom_right"
        return mask

    def _check_mask(self, mask, query, key, attention_mask):
        name = type(self).__name__
        if mask == "arbitrary" and attention_mask is None:
            raise ValueError(
                f"{name}: attn_mask_type: expected an attention_mask beside it, not arbitrary alone"
            )
        if mask == "causal" and query.shape[0] != key.shape[0]:
            built = ("no_mask", "causal_bottom_right")
            refuse(name, "attn_mask_type", mask, built, "the corners of the mask would differ")

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
        num_splits=None,
    ):
        refuse(type(self).__name__, "num_splits", num_splits, (None, 1))
        packed = option(packed_seq_params, "qkv_format") == "thd"
        mask = self._mask(attn_mask_type, packed, query.shape[0])
        if not packed:
            self._check_mask(mask, query, key, attention_mask)
        window = self.window
        if window is not None and "causal" not in mask and tuple(window) == (-1, 0):
            window = None
        dropout = self.attention_dropout if self.training else 0.0
        with fork("model-parallel-rng", query):
            out = core_attention(
                query,
                key,
                value,
                layout="thd" if packed else "sbhd",
                mask=mask,
                attention_mask=attention_mask,
                bias=attention_bias,
                dropout=dropout,
                packing=_packing(packed_seq_params) if packed else None,
                window=window,
                scale=self.softmax_scale,
                sink=self._sink(query),
                deterministic=option(self.config, "deterministic_mode", False),
                return_max_logit=self.return_max_logit,
            )
        return self._keep_max_logit(*out) if self.return_max_logit else out

    def _keep_max_logit(self, out, max_logit):
        """Keeps the largest score of each head since it was last reset to None."""
        before = self.current_max_attn_logits
        max_logit = max_logit.detach()
        self.current_max_attn_logits = (
            max_logit if before is None else torch.maximum(before, max_logit)
        )
        return out

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"):
        ranks = 1 if cp_global_ranks is None else len(cp_global_ranks)
        refuse(type(self).__name__, "cp_global_ranks", ranks, (1,), ONE_RANK)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors: softmax_offset where it is learnable, split by heads."""
        state = {}
        if self.softmax_type == "learnable":
            state = {"softmax_offset": self.softmax_offset}
        return sharded(self, state, {"softmax_offset": 0}, prefix, sharded_offsets, metadata)
