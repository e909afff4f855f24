"""Modules over quantized weights, and the conversion of a model's modules into them."""

from onegpu.nn.convert import Conversion, Kept, convert, linear_shape, matches, plan_conversion
from onegpu.nn.experts import QuantExperts, plain_experts_class
from onegpu.nn.joined import Joined, join
from onegpu.nn.linear import QuantLinear, QuantLinear4bit, QuantLinear8bit
from onegpu.nn.state import WeightSpec, dequantize_weight, dtype_named, quantize_weight

__all__ = [
    "Conversion",
    "Joined",
    "Kept",
    "QuantExperts",
    "QuantLinear",
    "QuantLinear4bit",
    "QuantLinear8bit",
    "WeightSpec",
    "convert",
    "dequantize_weight",
    "dtype_named",
    "join",
    "linear_shape",
    "matches",
    "plain_experts_class",
    "plan_conversion",
    "quantize_weight",
]
