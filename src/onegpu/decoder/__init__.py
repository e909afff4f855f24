"""Decoders with the host out of the loop: slots of keys and values, and one step from token to token on the device."""

from __future__ import annotations

from onegpu.decoder.optimize import DecoderReport, decoder_report, optimize_decoder, restore_decoder
from onegpu.decoder.options import DecoderOptions

__all__ = ["DecoderOptions", "DecoderReport", "decoder_report", "optimize_decoder", "restore_decoder"]
