"""Encoders without padding: the model stays Transformers' own, its layers see one stream of real tokens."""

from __future__ import annotations

from onegpu.encoder.embed import Encoder
from onegpu.encoder.optimize import EncoderOptions, EncoderReport, StackReport, optimize_encoder, restore_encoder

__all__ = ["Encoder", "EncoderOptions", "EncoderReport", "StackReport", "optimize_encoder", "restore_encoder"]
