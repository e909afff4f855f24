"""A model for lm-eval (EleutherAI's evaluation harness): its tasks on our formats, under the model name `onegpu`.

    python -m onegpu.bench.harness run --model onegpu --model_args pretrained=NAME,format=nf4 --tasks hellaswag

is lm-eval's own command line with that one model more; in Python, `register()` comes before `lm_eval.simple_evaluate`.
`format` is a label of `onegpu.bench.contenders`, so that 16 bit and bitsandbytes can be asked the same questions.
Scoring and generating are those of lm-eval's Hugging Face model, which gets our model ready-made.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from onegpu.bench.contenders import parse_contender
from onegpu.errors import UnsupportedError
from onegpu.fastpath import optimize as put_on_fast_path

__all__ = ["NAME", "main", "model_class", "register"]

NAME = "onegpu"


@cache
def model_class() -> Any:
    """The class that lm-eval makes, a subclass of its `HFLM`.

    Raises:
        UnsupportedError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UnsupportedError("lm-eval is not installed", "pip install lm_eval")
    from lm_eval.models.huggingface import HFLM

    class OneGpuLM(HFLM):
        """lm-eval's Hugging Face model, on a model that is loaded here."""

        def __init__(
            self,
            pretrained: str,
            format: str = "nf4",
            optimize: bool = True,
            device: str | None = None,
            revision: str | None = None,
            trust_remote_code: bool = False,
            **kwargs: Any,
        ) -> None:
            """Load `pretrained` (a folder or a Hub name) in `format`; `kwargs` are HFLM's (batch_size and others).

            Raises:
                ConfigError: a format that is none.
            """
            from transformers import AutoTokenizer

            hub: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            if revision is not None:
                hub["revision"] = revision
            contender = parse_contender(format)
            model = contender.load(pretrained, device_map=device or "auto", **hub)
            tokenizer = AutoTokenizer.from_pretrained(pretrained, **hub)
            # In 16 bit the logarithm of a softmax has an error of its own, larger than that of some formats.
            kwargs.setdefault("softmax_dtype", "float32")
            super().__init__(pretrained=put_on_fast_path(model) if optimize else model, tokenizer=tokenizer, **kwargs)

    return OneGpuLM


def register() -> None:
    """Make the model known to lm-eval; calling it again changes nothing.

    Raises:
        UnsupportedError: lm-eval is not installed.
    """
    found = model_class()
    from lm_eval.api.registry import MODEL_REGISTRY, register_model

    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(found)


def main() -> None:
    """lm-eval's command line, with our model."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
