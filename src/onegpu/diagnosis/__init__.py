"""What runs on this machine and what does not, in sentences with a cure."""

from __future__ import annotations

from onegpu.attention.sdpa import SdpaExplanation, explain_sdpa
from onegpu.diagnosis.checkup import Diagnosis, doctor
from onegpu.diagnosis.finding import Finding

__all__ = ["Diagnosis", "Finding", "SdpaExplanation", "doctor", "explain_sdpa"]
