"""Whether a model fits, planned from its config.json and the headers of its weights. Imports no torch."""

from __future__ import annotations

from onegpu.memory.gpus import Gpu, find_gpu, known_gpus, local_gpu
from onegpu.memory.plan import fit
from onegpu.memory.report import FitReport, FormatFit

__all__ = ["FitReport", "FormatFit", "Gpu", "find_gpu", "fit", "known_gpus", "local_gpu"]
