"""Each block's scale by least squared error instead of by its largest weight.

The formats only ever multiply a table value by the stored scale, so any scale is legal. Dividing by the maximum
wastes codes on one outlier of a block; the search tries a fixed list of factors of the maximum and keeps the one with
the least squared error of the block, weighted if importance is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onegpu.formats.codebooks import codebook, encode, reciprocal

__all__ = ["FACTORS", "search_scale"]

FACTORS = (1.0, -1.0, 0.85, -0.85, 0.92, -0.92)


def search_scale(
    blocks: Tensor, absmax: Tensor, quant_type: str, *, importance: Tensor | None = None, signed: bool = True
) -> Tensor:
    """The best of `absmax` times each of `FACTORS`, block by block: float32 [num_blocks].

    Args:
        blocks: float32 [num_blocks, blocksize].
        absmax: float32 [num_blocks], the largest magnitude of each.
        importance: float32 like `blocks`, weights of the squared errors.
        signed: whether negative factors take part.
    """
    code = codebook(quant_type, blocks.device)
    best = absmax
    least: Tensor | None = None
    for factor in FACTORS:
        if factor < 0 and not signed:
            continue
        scale = absmax * factor
        codes = encode(blocks * reciprocal(scale)[:, None], quant_type)
        values = torch.index_select(code, 0, codes.view(-1).int()).view_as(blocks)
        error = (values * scale[:, None]).sub_(blocks).square_()
        if importance is not None:
            error = error.mul_(importance)
        total = error.sum(dim=1)
        if least is None:
            least = total
            continue
        better = total < least
        best = torch.where(better, scale, best)
        least = torch.where(better, total, least)
    return best
