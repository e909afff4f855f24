"""The one head that compares tokens with each other: extractive question answering.

Its answer is the likeliest position of the whole row. At padding the layers leave zeros, which such a head turns into a
middling score, and a plain model into whatever it learned; an answer must lie in the text. So the scores of padding are
the smallest number there is. With positions to learn from, the loss is over the whole row, and the plain model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onegpu.encoder.calls import MethodCall

if TYPE_CHECKING:
    from onegpu.encoder.stack import Stack

__all__ = ["AnswerCall", "is_question_answering"]

SCORES = ("start_logits", "end_logits")


def is_question_answering(model: nn.Module, tower: nn.Module) -> bool:
    """Whether a model's own head scores the positions of `tower`'s rows."""
    config: Any = getattr(model, "config", None)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    return model is not tower and type(model).__name__.endswith("ForQuestionAnswering") and not encoder_decoder


class AnswerCall(MethodCall):
    """The forward of a question-answering model."""

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        super().__init__(module)
        self.stack = stack

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        if self.removed or not stack.enabled:
            return self.plain(*args, **kwargs)
        given = self.__signature__.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        if given.get("start_positions") is not None:
            stack.enabled = False
            try:
                return self.plain(*args, **kwargs)
            finally:
                stack.enabled = True
        stack.ran_unpadded = False
        output = self.plain(*args, **kwargs)
        mask = given.get("attention_mask")
        if not stack.ran_unpadded or not isinstance(mask, Tensor):
            return output
        if isinstance(output, dict):
            for name in SCORES:
                output[name] = hide(output[name], mask)
            return output
        return (hide(output[0], mask), hide(output[1], mask), *output[2:])


def hide(scores: Tensor, mask: Tensor) -> Tensor:
    """[B, S] with padding at the smallest number of the dtype."""
    return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
