"""The cosine and sine tables that rotary position embedding reads."""

import torch


def rotary_tables(positions, rotary_dim, base):
    """(cos, sin), float32 [positions, rotary_dim / 2] on the CPU, rounded once from float64."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    frequencies = torch.pow(base, exponents).reciprocal()
    angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


class RotaryTables(torch.nn.Module):
    """Buffers cos and sin, float32 [positions, rotary_dim / 2], not in the state dict.

    Only their device follows the module: `.to(torch.bfloat16)` leaves them float32, since bfloat16
    cannot tell neighbouring positions apart, and `to_empty` from meta leaves them filled.
    """

    def __init__(self, positions, rotary_dim, base, device=None):
        super().__init__()
        self.shape, self.base = (positions, rotary_dim), base
        self.place(torch.empty(0, device=device).device)

    def place(self, device):
        """Puts the tables on `device`: shapes alone on meta, moved or else computed elsewhere."""
        positions, rotary_dim = self.shape
        if device.type == "meta":
            cos = torch.empty(positions, rotary_dim // 2, dtype=torch.float32, device=device)
            sin = torch.empty_like(cos)
        elif getattr(self, "cos", None) is None or self.cos.is_meta:
            cos, sin = (table.to(device) for table in rotary_tables(*self.shape, self.base))
        else:
            cos, sin = self.cos.to(device), self.sin.to(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn, recurse=True):
        device = fn(self.cos.new_empty(0)).device
        if device != self.cos.device:
            self.place(device)
        return self

    def forward(self, x):
        """(cos, sin) for x; after load_state_dict(assign=True) they are still on meta here."""
        cos, sin = self.cos, self.sin
        if cos.is_meta and not x.is_meta:
            self.place(x.device)
            return self.cos, self.sin
        return cos, sin
