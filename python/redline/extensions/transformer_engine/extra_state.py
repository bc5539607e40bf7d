"""The key `_extra_state`, which Transformer Engine's checkpoints hold for every module."""

import torch


class ExtraState(torch.nn.Module):
    """Gives it empty, accepts it whatever it holds, and does not miss it: scales of quantised
    products are not kept, so that checkpoints move both ways."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        """Ignored."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(prefix + "_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
