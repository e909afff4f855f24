"""One forward through a stack: decided at the first layer, in one of four ways.

    plain      the model's own, with the reason counted in the stack's `outcomes`
    direct     unpadded at the first layer, each layer called as the model calls it
    deferred   the model's loop only notes its calls down; at the last one they run as a list: from unpadded tokens,
               or on the padded batch where there is no padding (`dense`); the list is what a graph captures

Where the tower already began to read the mask (`EarlyBatch`), all that a graph needs lies in the arena by the time the
host knows the lengths, and between knowing them and the replay there is a look into a table.

The list is learned by watching a direct run: how many calls, what each returns, and that each takes what the one
before gave. What only passes from call to call (T5's position bias) is noted as a `Ref`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onegpu.attention.interface import note_of
from onegpu.attention.unpadded import AttentionView, PendingBatch, RelativeBias, UnpaddedBatch, pad_input, unpad_input
from onegpu.attention.varlen import flash_allowed
from onegpu.encoder.arena import EarlyBatch
from onegpu.encoder.buckets import bucket_of
from onegpu.encoder.embeddings import LateEmbedding, TouchedError
from onegpu.encoder.program import Program, Ref, densified, densify, run_program

if TYPE_CHECKING:
    from onegpu.encoder.stack import LayerCall, Stack

__all__ = ["Learned", "Run", "pad_output"]

# A row of these is what a layer may be given beside hidden states and mask, with the dimension of the columns.
TOKEN_ARGUMENTS = {"position_embeddings": 1, "position_ids": 1, "sinusoidal_pos": 2}
# What an additive mask adds for padding, beside the smallest number of its dtype; MarkupLM's.
SMALL_PADDING = -10000.0


@dataclass(frozen=True, slots=True)
class Learned:
    """What a direct run showed: for each call, None for a tensor, or for a tuple which items are not None."""

    shapes: tuple[tuple[bool, ...] | None, ...]
    chained: bool


class Refusal(Exception):  # noqa: N818
    """This forward is left to the plain model, for the reason given."""


class Run:
    """The state of one forward. Made at the owner's entrance, finished at its exit."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.mode = ""
        self.pending: PendingBatch | UnpaddedBatch | EarlyBatch | None = None
        self.batch: UnpaddedBatch | None = None
        self.may_fuse = False
        self.is_full = False
        self.seqlen = 0
        self.program: Program = []
        self.entered: Tensor | None = None
        self.late: LateEmbedding | None = None
        self.last: Tensor | None = None
        self.chained = True
        self.shapes: list[tuple[bool, ...] | None] = []
        self.translated: dict[int, tuple[Any, Any]] = {}

    @property
    def is_plain(self) -> bool:
        return self.mode == "plain"

    def layer(self, call: LayerCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a layer by the model's loop."""
        hidden, rest = call.bind(args, kwargs)
        if not self.mode:
            try:
                self.decide(hidden, rest)
            except Refusal as refusal:
                self.refuse(refusal)
        if self.mode == "plain":
            return call.plain(hidden, **densified(rest))
        if self.mode == "deferred":
            return self.defer(call, hidden, rest)
        return self.direct(call, hidden, {name: self.translate(name, value) for name, value in rest.items()})

    def refuse(self, refusal: Refusal) -> None:
        """From here on the forward is the plain model's."""
        if self.late is not None:
            self.late.fill()
        self.mode = "plain"
        self.stack.outcomes[f"plain: {refusal}"] += 1

    def decide(self, hidden: Any, rest: dict[str, Any]) -> None:
        """Choose the way and, where there is a mask, begin to read it.

        Raises:
            Refusal: the plain way, and why.
        """
        stack = self.stack
        self.late = stack.late
        if stack.embeddings is not None:
            stack.embeddings.learn(hidden)
        if self.late is not None and hidden is not self.late.placeholder:
            raise TouchedError
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.numel() == 0:
            raise Refusal("the layers get no hidden states [B, S, hidden]")
        for name in ("encoder_hidden_states", "past_key_values", "key_value_states"):
            if rest.get(name) is not None:
                raise Refusal(f"{name} was given")
        if captured_outputs() - {"hidden_states"}:
            raise Refusal("attentions were asked for")
        if any(foreign_hooks(layer) for layer in stack.layers):
            raise Refusal("a layer has a hook that is not ours")
        self.seqlen = hidden.shape[1]
        on_gpu = hidden.device.type == "cuda" or stack.graphs.works_anywhere
        self.may_fuse = on_gpu and not wants_grad(hidden, stack) and not torch.is_autocast_enabled(hidden.device.type)
        self.is_full = is_full(rest.get("attention_mask"))
        self.pending = None if self.is_full else self.begin_batch(hidden, rest.get("attention_mask"))
        if self.pending is None and not self.may_fuse and not self.is_full:
            raise Refusal("there is no padding to leave out")
        learned = stack.learned
        in_between = stack.wants_states or captured_outputs()
        if self.may_fuse and stack.options.graphs and learned is not None and learned.chained and not in_between:
            self.mode = "deferred"
            return
        if self.late is not None:
            self.late.fill()
        self.mode = "direct"
        self.settle([rest])

    def begin_batch(self, hidden: Tensor, mask: Any) -> PendingBatch | UnpaddedBatch | EarlyBatch | None:
        """The batch as far as it is known without waiting: the caller's own if it gave one, None without a mask."""
        note = note_of(mask)
        if note is None or note.padding.shape != hidden.shape[:2]:
            return None
        if note.padding is self.stack.probe:
            self.stack.passes_mask_on = True
        early = self.stack.early
        if early is not None and note.padding is early.mask:
            return early
        hint, self.stack.hint = self.stack.hint, None
        if hint is not None and (hint.batch_size, hint.seqlen) == tuple(note.padding.shape):
            return hint
        return PendingBatch.of(note.padding, odd_values(mask) if note.is_guess else None)

    def settle(self, arguments: list[dict[str, Any]]) -> None:
        """Wait for the batch, and see that it and every argument of the layers can go without padding.

        Raises:
            Refusal: the plain way, and why.
        """
        stack, pending = self.stack, self.pending
        if isinstance(pending, EarlyBatch):
            self.check_early(pending)
            self.batch = stack.graphs.arena_on(pending.mask.device).batch(pending, pending.sizes())
            if self.mode != "deferred":
                self.batch = PendingBatch.of(pending.mask).resolve()
        elif pending is not None:
            if isinstance(pending, PendingBatch):
                if pending.has_odd_values():
                    raise Refusal("the mask holds values other than 0 and 1")
                pending = pending.resolve()
            self.check_rows(pending.total, pending.has_first)
            self.batch = bucket_of(pending) if self.mode == "deferred" else pending
        for rest in arguments:
            for name, value in rest.items():
                self.translate(name, value)
        stack.outcomes[f"{self.mode}{'' if self.batch is not None else ', no padding'}"] += 1

    def check_early(self, early: EarlyBatch) -> None:
        """As `check_rows`. Waits."""
        total, _, _, begun = early.wait()
        self.check_rows(total, begun == early.mask.shape[0])

    def check_rows(self, total: int, has_first: bool) -> None:
        """See that the rows can go without padding.

        Raises:
            Refusal: the plain way, and why.
        """
        if self.stack.first_token_matters and not has_first:
            raise Refusal("a row begins with padding, and the model may read its first token")
        if total == 0:
            raise Refusal("there is no real token")

    def translate(self, name: str, value: Any) -> Any:
        """An argument of a layer, from padded rows to unpadded tokens.

        Raises:
            Refusal: a tensor whose meaning is not known.
        """
        batch = self.batch
        if batch is None:
            return None if self.is_full and name == "attention_mask" and is_full(value) else densify(value)
        if value is None or isinstance(value, (bool, int, float, str, RelativeBias, Ref)):
            return value
        known = self.translated.get(id(value))
        if known is not None:
            return known[1]
        if name == "attention_mask":
            note = note_of(value)
            if note is None or note.padding.shape != (batch.batch_size, batch.seqlen):
                raise Refusal("a layer's mask is of a kind not known")
            out: Any = AttentionView(batch, note.causal, note.window, self.stack.options.attention)
        elif name in TOKEN_ARGUMENTS and isinstance(value, Tensor):
            out = self.gather(value, TOKEN_ARGUMENTS[name])
        elif name in TOKEN_ARGUMENTS and isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
            out = tuple(self.gather(part, TOKEN_ARGUMENTS[name]) for part in value)
        else:
            raise Refusal(f"the layers get an argument {name} that is not known")
        self.translated[id(value)] = (value, out)
        return out

    def gather(self, value: Tensor, dim: int) -> Tensor:
        """[B or 1, ..., S, ...] with the columns at `dim` to [1, ..., T, ...]."""
        batch = self.batch
        assert batch is not None
        if value.dim() <= dim or value.shape[dim] != batch.seqlen:
            raise Refusal(f"an argument by position has the shape {list(value.shape)}")
        if value.shape[0] == 1:
            return value.index_select(dim, batch.positions.long())
        if dim != 1 or value.shape[0] != batch.batch_size:
            raise Refusal(f"an argument by position has the shape {list(value.shape)}")
        return value.flatten(0, 1).index_select(0, batch.indices)[None]

    def direct(self, call: LayerCall, hidden: Any, rest: dict[str, Any]) -> Any:
        """Run the layer now; note what it takes and gives."""
        if self.last is None:
            hidden = hidden if self.batch is None else unpad_input(hidden, self.batch)
        elif hidden is not self.last:
            self.chained = False
        out = call.plain(hidden, **rest)
        self.last = out[0] if isinstance(out, tuple) else out
        self.shapes.append(tuple(item is not None for item in out) if isinstance(out, tuple) else None)
        return out

    def defer(self, call: LayerCall, hidden: Any, rest: dict[str, Any]) -> Any:
        """Note the call down; at the last one, run them all."""
        learned = self.stack.learned
        assert learned is not None
        if self.entered is None:
            self.entered = hidden
        assert hidden is self.entered, "the model's loop changed hidden states between layers"
        index = len(self.program)
        self.program.append((call, rest))
        result = self.entered if index + 1 < len(learned.shapes) else self.execute()
        shape = learned.shapes[index]
        if shape is None:
            return result
        return tuple(
            result if item == 0 else Ref(index, item) if present else None for item, present in enumerate(shape)
        )

    def execute(self) -> Tensor:
        """Run what was noted down: by a graph where there is one, else as it stands."""
        assert self.entered is not None
        graphs, early = self.stack.graphs, self.pending if isinstance(self.pending, EarlyBatch) else None
        if self.late is not None and early is None:  # a mask that hides nothing was left out
            self.late.fill()
            self.late = None
        start = self.entered if self.late is None else self.late
        graphs.refresh(self.stack.parts())
        signature = None if early is None else self.signature(early)
        try:
            if early is not None and signature is not None:
                self.check_early(early)
                sizes = early.sizes()
                arena = graphs.arena_on(early.mask.device)
                found = graphs.replay_quickly(signature, sizes, start, lambda: arena.batch(early, sizes))
                if found is not None:
                    output, self.batch = found
                    if self.late is not None:
                        self.late.is_settled = True
                    self.stack.outcomes["deferred"] += 1
                    return output
            self.settle([rest for _, rest in self.program])
        except Refusal as refusal:
            self.batch = None
            self.refuse(refusal)
            return run_program([(call, densified(rest)) for call, rest in self.program], self.entered)
        program = [(call, {n: self.translate(n, v) for n, v in rest.items()}) for call, rest in self.program]
        quick = None if early is None or signature is None else (signature, early.sizes())
        if self.late is not None:
            self.late.is_settled = True
        return graphs.run(program, start, self.batch, quick, in_arena=early is not None)

    def signature(self, early: EarlyBatch) -> int | None:
        """All that the program bakes into a graph but the sizes, as a number; None where it takes other tensors."""
        graphs, entered = self.stack.graphs, self.entered
        assert entered is not None
        parts: list[Any] = [flash_allowed(), entered.shape[2], entered.dtype, entered.device]
        parts.append(None if self.late is None else self.late.names)
        for call, rest in self.program:
            parts.append(id(call))
            for name, value in rest.items():
                if name == "attention_mask" and isinstance(value, Tensor):
                    note = note_of(value)
                    if note is None or note.padding is not early.mask:
                        return None
                    parts.append(("view", note.causal, note.window))
                elif value is None or isinstance(value, (bool, int, float, str, Ref)):
                    parts.append((name, value))
                else:
                    return None
        return graphs.number_of(("quick", *parts))

    def finish(self, output: Any) -> Any:
        """The owner's output with padding put back."""
        if self.mode == "direct" and self.stack.learned is None and self.shapes:
            self.stack.learned = Learned(tuple(self.shapes), self.chained)
        if self.is_plain or self.batch is None or not self.mode:
            return output
        self.stack.ran_unpadded = True
        return pad_output(output, self.batch)


def pad_output(output: Any, batch: UnpaddedBatch) -> Any:
    """A module's output with every stream of tokens in it padded again."""
    tokens = batch.indices.numel()

    def back(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(back(part) for part in value)
        if isinstance(value, Tensor) and value.dim() >= 3 and value.shape[:2] == (1, tokens):
            return pad_input(value, batch)
        return value

    if isinstance(output, dict):
        for name, value in list(output.items()):
            if value is not None:
                output[name] = back(value)
        return output
    return back(output)


def wants_grad(hidden: Tensor, stack: Stack) -> bool:
    """Whether a gradient may be asked of this forward."""
    if not torch.is_grad_enabled():
        return False
    return hidden.requires_grad or any(p.requires_grad for layer in stack.layers for p in layer.parameters())


def odd_values(mask: Tensor) -> Tensor | None:
    """Where an additive mask holds neither 0 nor what stands for padding: a caller's mask of other values than 0 and 1.

    Such a mask weighs keys, or hides a key whose own position is real; only the plain model knows.
    """
    if not mask.is_floating_point():
        return None
    small = float(torch.tensor(SMALL_PADDING, dtype=mask.dtype))
    return (mask != 0) & (mask != torch.finfo(mask.dtype).min) & (mask != small)


def is_full(mask: Any) -> bool:
    """Whether a mask on the CPU hides nothing, so that the layers do as well without it. A GPU is not asked."""
    note = note_of(mask)
    if note is None or note.padding.device.type != "cpu" or note.causal or note.window is not None:
        return False
    return bool(note.padding.all())


def captured_outputs() -> set[str]:
    """What Transformers is collecting by hooks on the layers: hidden states, attentions."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return set()
    return {key for key in _active_collector.get() or () if not key.startswith("_")}


def foreign_hooks(layer: torch.nn.Module) -> bool:
    """Whether anyone else watches this layer; Transformers' own watchers are asked for by `captured_outputs`."""
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    return any("output_capturing_hook" not in getattr(hook, "__qualname__", "") for hook in hooks)
