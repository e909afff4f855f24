"""Sizes that captured graphs are made for, so that many batches share few of them.

A bucket wastes at most the tokens up to the next size: none to speak of below 64, under a quarter to 256, and then
less than the rows of one tile of a matrix product, which are computed anyway.
"""

from __future__ import annotations

from onegpu.attention.unpadded import UnpaddedBatch

__all__ = ["bucket_of", "sequence_bucket", "token_bucket"]

# (up to this many tokens, in steps of)
TOKEN_STEPS = ((64, 32), (512, 64), (16384, 128))
LARGEST_STEP = 256
LENGTH_STEP = 128


def round_up(number: int, step: int) -> int:
    return (number + step - 1) // step * step


def token_bucket(tokens: int) -> int:
    """The number of rows that `tokens` tokens run as."""
    for limit, step in TOKEN_STEPS:
        if tokens <= limit:
            return round_up(tokens, step)
    return round_up(tokens, LARGEST_STEP)


def sequence_bucket(sequences: int) -> int:
    """The number of sequences, one for the filling included: powers of two to 16, then multiples of 16."""
    wanted = sequences + 1
    return 1 << (wanted - 1).bit_length() if wanted <= 16 else round_up(wanted, 16)


def length_bucket(longest: int) -> int:
    """The longest sequence: 32, 64, then multiples of 128."""
    return next((size for size in (32, 64) if longest <= size), round_up(longest, LENGTH_STEP))


def bucket_of(batch: UnpaddedBatch) -> UnpaddedBatch:
    """The batch in arrays of bucket sizes."""
    tokens = token_bucket(batch.total)
    longest = length_bucket(max(batch.max_seqlen, tokens - batch.total))
    return batch.bucket(tokens, sequence_bucket(batch.cu_seqlens.numel() - 1), longest)
