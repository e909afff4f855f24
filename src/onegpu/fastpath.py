"""The fast path, switched on and off in place: `optimize(model)`, `restore(model)`.

`to_bettertransformer()` and `reverse_bettertransformer()` of the 2023 guide are these two calls. A part of the model
that has no faster way stays as it is, and `onegpu.report(model)` says which and why.
"""

from __future__ import annotations

from typing import Any

from onegpu.errors import UnsupportedError

__all__ = ["optimize", "restore"]


def optimize(model: Any, *, kv_cache_dtype: str | None = None) -> Any:
    """Put a model on its fast path, in place; calling it again changes nothing.

    Encoders run without padding, `generate` runs step after step on the device. The weights, the parameters' names, the
    name of the class and what the model returns stay the same. Returns the model.

    Args:
        kv_cache_dtype: "int8" or "fp8" to keep keys and values of generation in 8 bit, None for the model's own dtype.

    Raises:
        ConfigError: an unknown `kv_cache_dtype`.
        UnsupportedError: not a Transformers model.
    """
    from onegpu.kernels.first_use import begin_for

    check_model(model)
    # What libraries do at first goes on while the rest of this package is imported and the model is looked at.
    libraries = begin_for(model)
    try:
        from onegpu.decoder import DecoderOptions, optimize_decoder
        from onegpu.encoder import optimize_encoder

        options = DecoderOptions(kv_cache_dtype=kv_cache_dtype)
        optimize_encoder(model)
        optimize_decoder(model, options)
    finally:
        # Graphs are captured beside no other thread's work.
        libraries.wait()
    return model


def restore(model: Any) -> Any:
    """Take a model off the fast path: every forward and `generate` are Transformers' own again. Returns the model.

    Raises:
        UnsupportedError: not a Transformers model.
    """
    from onegpu.decoder import restore_decoder
    from onegpu.encoder import restore_encoder

    check_model(model)
    restore_decoder(model)
    restore_encoder(model)
    return model


def check_model(model: Any) -> None:
    """Refuse what is not a Transformers model."""
    if not (hasattr(model, "config") and hasattr(model, "base_model_prefix")):
        raise UnsupportedError(
            f"expected a Transformers model (a PreTrainedModel); got {type(model).__name__}",
            "for a sentence-transformers model pass its Transformers model: model[0].auto_model",
        )
