"""From disk to a ready model, and back: plan, convert, stream, place, save."""

from onegpu.loading.auto import auto_class
from onegpu.loading.pretrained import load, register
from onegpu.loading.quantizer import OneGpuQuantizer

__all__ = ["OneGpuQuantizer", "auto_class", "load", "register"]
