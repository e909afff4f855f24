"""The kinds of machine code that a 4-bit product on a CPU can be compiled to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FORMS", "Form", "Threads", "Variant"]


@dataclass(frozen=True, slots=True)
class Form:
    """One way to look codes up: the LLVM processor it is compiled for, and what that processor must have."""

    name: str
    cpu: str
    needs: tuple[str, ...]
    lanes: int
    tiles: tuple[tuple[int, int], ...]  # rows of x, rows of W beside them; as many as the registers hold
    max_rows: int  # of x, beyond which it is quicker to dequantize once and use torch's product


AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
AVX2 = ("avx2", "fma", "f16c", "bmi2")
FORMS = {
    form.name: form
    for form in (
        Form("avx512", "x86-64-v4", AVX512, 16, ((4, 2), (2, 4), (1, 4)), 128),
        Form("avx2", "x86-64-v3", AVX2, 8, ((4, 1), (2, 2), (1, 4)), 64),
        # Never given float16, which not every processor converts by itself.
        Form("generic", "", (), 4, ((4, 1), (2, 1), (1, 2)), 16),
    )
}


@dataclass(frozen=True, slots=True)
class Variant:
    """What a compiled product is special to. dtypes: `float32`, `bfloat16`, `float16`; of the bias also ''."""

    form: Form
    x_dtype: str
    bias_dtype: str
    blocksize: int
    nested: bool
    aligned: bool  # K % blocksize == 0: no block goes over the end of a row


@dataclass(frozen=True, slots=True)
class Threads:
    """Addresses of the OpenMP runtime that torch itself uses: one pool of threads, no second one beside it."""

    parallel: int
    max_threads: int
    num_threads: int
    thread_num: int
