"""The fused way through steps and prompts: recognised structures as about seven kernels a layer, proved before use."""

from onegpu.decoder.fused.plan import FusedPlan
from onegpu.decoder.fused.prompt import FusedPrompt
from onegpu.decoder.fused.prove import prove
from onegpu.decoder.fused.recognise import recognise
from onegpu.decoder.fused.rows import CheckedStep
from onegpu.decoder.fused.step import FusedStep

__all__ = ["CheckedStep", "FusedPlan", "FusedPrompt", "FusedStep", "prove", "recognise"]
