"""Rows of experts filled up with zeros to a multiple, and the same rows taken out again."""

import torch

from redline.extensions.transformer_engine.table import composed

_ALIGN = 16  # what products in FP8 ask of the number of rows


class _Padding(torch.nn.Module):
    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        self.num_gemms = num_gemms
        self.align_size = _ALIGN if align_size is None else align_size

    def padded(self, m_splits):
        if len(m_splits) != self.num_gemms:
            raise ValueError(
                f"{type(self).__name__}: m_splits: expected {self.num_gemms} counts, "
                f"not {len(m_splits)}"
            )
        return [-(-rows // self.align_size) * self.align_size for rows in m_splits]

    def check_rows(self, inp, splits):
        if inp.shape[0] != sum(splits):
            raise ValueError(
                f"{type(self).__name__}: inp: expected {sum(splits)} rows, not {inp.shape[0]}"
            )


@composed("pad, cat and split of torch")
class Fp8Padding(_Padding):
    """forward(inp [rows, H], m_splits) -> (padded [rows', H], padded_splits).

    Each of the num_gemms blocks of rows is followed by zeros up to a multiple of align_size (16).
    """

    def forward(self, inp, m_splits):
        padded = self.padded(m_splits)
        self.check_rows(inp, m_splits)
        if padded == list(m_splits):
            return inp, m_splits
        blocks = [
            torch.nn.functional.pad(block, (0, 0, 0, rows - len(block)))
            for block, rows in zip(inp.split(list(m_splits)), padded, strict=True)
        ]
        return torch.cat(blocks), padded


@composed("pad, cat and split of torch")
class Fp8Unpadding(_Padding):
    """forward(inp [rows', H], m_splits) -> [rows, H]: Fp8Padding the other way, by its m_splits."""

    def forward(self, inp, m_splits):
        padded = self.padded(m_splits)
        self.check_rows(inp, padded)
        if padded == list(m_splits):
            return inp
        blocks = inp.split(padded)
        return torch.cat([block[:rows] for block, rows in zip(blocks, m_splits, strict=True)])
