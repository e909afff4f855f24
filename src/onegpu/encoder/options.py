"""What a user may switch, for measuring or in need."""

from __future__ import annotations

from dataclasses import dataclass

from onegpu.config import check_choice

__all__ = ["ACTIVATIONS", "EncoderOptions"]

ACTIVATIONS = ("epilogue", "chunked", "inplace", "off")


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """How an encoder is run. The defaults are the fastest measured; CPU encoders know neither graphs nor fusing.

    `attention` names a backend of `onegpu.attention.varlen`, None for the first that can. `graphs` captures the layers
    in CUDA graphs. `fuse_qkv` makes one product of query, key and value; `fuse_norm` joins residual and LayerNorm;
    `fuse_activation` puts GELU at the end of its product (`epilogue`), in place behind it (`inplace`), there too but
    some rows at a time, so that they stay in the cache between (`chunked`), or nowhere (`off`).

    Raises:
        ConfigError: an unknown name.
    """

    attention: str | None = None
    graphs: bool = True
    fuse_qkv: bool = True
    fuse_norm: bool = True
    fuse_activation: str = "inplace"

    def __post_init__(self) -> None:
        check_choice("fuse_activation", self.fuse_activation, ACTIVATIONS)
        if self.attention is not None:
            from onegpu.attention.varlen import BACKENDS

            check_choice("attention", self.attention, [backend.name for backend in BACKENDS])
