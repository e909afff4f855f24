"""One decode step, from the tokens chosen last to the tokens chosen next, all on the device.

    logits = forward(tokens, positions)
    next = selection(logits, history);  history += next;  positions += 1;  finished |= stop(next)

The very same callable runs eagerly and is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from onegpu.decoder.sampling import Selection, SelectionState
from onegpu.decoder.state import BAD, FINISHED, TOKEN, StepState
from onegpu.decoder.stopping import StopRule, StopState

__all__ = ["Choice", "DecodeStep", "StepForward"]

# tokens int64 [B], positions int32 [B] -> logits [B, V], appending to the cache
StepForward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """How tokens are chosen and rows end, with the buffers of some number of rows."""

    selection: Selection
    stop: StopRule
    selection_state: SelectionState
    stop_state: StopState


class DecodeStep:
    """The step of rows 0 .. `rows` - 1."""

    def __init__(self, forward: StepForward, state: StepState, rows: int, choice: Choice) -> None:
        self.forward = forward
        self.state = state
        self.rows = rows
        self.choice = choice

    def __call__(self) -> None:
        """One step."""
        state, rows = self.state, self.rows
        self.advance(self.forward(state.tokens[:rows], state.positions[:rows]))

    def advance(self, logits: Tensor) -> None:
        """From the logits [rows, V] of the last tokens to the next tokens and all the books."""
        state, rows = self.state, self.rows
        logits = logits.float()
        history, lengths, prompts = state.history[:rows], state.lengths[:rows], state.prompt_lengths[:rows]
        finished, positions = state.finished[:rows], state.positions[:rows]
        chosen = self.choose(logits, history, lengths, prompts, finished)
        # The largest logit is a NaN where any is.
        bad = logits.amax(-1).isnan() & ~finished
        history.scatter_(1, lengths[:, None].long(), chosen[:, None])
        lengths.add_(1).clamp_(max=history.shape[1] - 1)
        # Where nothing fills finished rows, they go on as Transformers lets them.
        positions.add_(~finished if self.choice.stop.has_eos else 1).clamp_(max=state.last_place)
        state.tokens[:rows] = chosen
        finished.copy_(self.choice.stop(chosen, history, lengths, prompts, finished, self.choice.stop_state))
        state.outbox[TOKEN, :rows] = chosen
        state.outbox[FINISHED, :rows] = finished
        state.outbox[BAD, :rows] = bad

    def choose(self, logits: Tensor, history: Tensor, lengths: Tensor, prompts: Tensor, finished: Tensor) -> Tensor:
        """The next tokens int64 [rows], padding in rows that are finished."""
        chosen = self.choice.selection(logits, history, lengths, prompts, self.choice.selection_state)
        return self.choice.stop.filled(chosen, finished, self.choice.stop_state)
