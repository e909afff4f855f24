"""What a user may choose, checked once. Imports no torch, so that `onegpu --help` stays quick."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from onegpu.errors import ConfigError

__all__ = [
    "AUTO_CLASSES",
    "BLOCKSIZES",
    "COMPUTE_DTYPES",
    "DEFAULT_BLOCKSIZE",
    "DEFAULT_THRESHOLD",
    "NESTED_BLOCKSIZE",
    "QUANT_STORAGE_DTYPES",
    "QUANT_TYPES",
    "QuantConfig",
    "cache_folder",
    "check_choice",
]

# Transformers' Auto classes that load a model; each has one of the same name here.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForAudioClassification",
    "AutoModelForAudioFrameClassification",
    "AutoModelForAudioXVector",
    "AutoModelForCTC",
    "AutoModelForCausalLM",
    "AutoModelForDepthEstimation",
    "AutoModelForDocumentQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForImageSegmentation",
    "AutoModelForImageTextToText",
    "AutoModelForInstanceSegmentation",
    "AutoModelForKeypointDetection",
    "AutoModelForMaskGeneration",
    "AutoModelForMaskedImageModeling",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForObjectDetection",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSemanticSegmentation",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTableQuestionAnswering",
    "AutoModelForTextEncoding",
    "AutoModelForTextToSpectrogram",
    "AutoModelForTextToWaveform",
    "AutoModelForTokenClassification",
    "AutoModelForUniversalSegmentation",
    "AutoModelForVideoClassification",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForZeroShotObjectDetection",
)
QUANT_TYPES = ("nf4", "fp4", "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
DEFAULT_BLOCKSIZE = 64
DEFAULT_THRESHOLD = 6.0
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
QUANT_STORAGE_DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")


def cache_folder() -> Path:
    """$ONEGPU_CACHE, else onegpu/ in $XDG_CACHE_HOME, else ~/.cache/onegpu."""
    own = os.environ.get("ONEGPU_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onegpu"


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise `ConfigError` with the nearest spelling when `value` is not one of `choices`."""
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in known], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(map(str, known))}"
    listed = ", ".join(repr(choice) for choice in known)
    raise ConfigError(f"{name} must be one of {listed}; got {value!r}", hint)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How the weights of a model are stored.

    `quant_type` is `nf4`, `fp4` (QLoRA, arXiv 2305.14314) or `int8` (LLM.int8(), arXiv 2208.07339).
    The other fields say, for 4 bit: `blocksize` weights share one scale; `double_quant` stores those scales in
    8 bit; `quant_storage` is the dtype the packed bytes are kept in; `scale_search` picks each block's scale by
    least squared error instead of the maximum. For 8 bit: `threshold` is the outlier magnitude of LLM.int8(),
    0 for none. For both: `compute_dtype` is the dtype of the product, None for the model's own 16-bit dtype;
    `skip_modules` stay in 16 bit, added to those that always do.

    Raises:
        ConfigError: a field out of its range, with the nearest valid spelling.
    """

    quant_type: str = "nf4"
    blocksize: int = DEFAULT_BLOCKSIZE
    double_quant: bool = False
    scale_search: bool = False
    compute_dtype: str | None = None
    quant_storage: str = "uint8"
    skip_modules: tuple[str, ...] = ()
    threshold: float = DEFAULT_THRESHOLD

    def __post_init__(self) -> None:
        check_choice("quant_type", self.quant_type, QUANT_TYPES)
        check_choice("blocksize", self.blocksize, BLOCKSIZES)
        check_choice("quant_storage", self.quant_storage, QUANT_STORAGE_DTYPES)
        if self.compute_dtype is not None:
            check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold < 65504:
            raise ConfigError(
                f"threshold must be a number from 0 (no outliers) to below 65504; got {self.threshold!r}",
                f"LLM.int8() uses {DEFAULT_THRESHOLD}",
            )
        names: Any = self.skip_modules
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"skip_modules must be a sequence of module names; got {self.skip_modules!r}",
                'write skip_modules=("lm_head",)',
            )
        object.__setattr__(self, "skip_modules", tuple(self.skip_modules))

    @property
    def bits(self) -> int:
        """Bits of one stored weight code: 4 or 8."""
        return 8 if self.quant_type == "int8" else 4

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Build from field names; an unknown name is a `ConfigError` that names the nearest one."""
        names = [field.name for field in fields(cls)]
        for key in values:
            check_choice("QuantConfig field", key, names)
        return cls(**values)
