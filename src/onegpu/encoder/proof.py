"""Proofs before anything is kept: a small padded batch through the plain model and through ours.

Each asks the tower for its own outputs, so that what a model does around its layers is in it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onegpu.encoder.stack import Stack

__all__ = ["prove_late_embeddings", "prove_stack"]

# Largest difference allowed in the proof, of the plain result's largest magnitude.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
INT8_COSINE = 0.98


def prove_stack(stack: Stack) -> tuple[bool, str | None]:
    """Run the tower on two short rows, one padded, with and without padding: (proved, reason to leave it alone).

    A tower that takes something else than token ids, or that lives on no real device, can't be asked: it is kept on
    the word of the structure alone.
    """
    batch = probe_batch(stack.tower)
    if batch is None:
        return False, None
    training = [module for module in stack.tower.modules() if module.training]
    for module in training:
        module.training = False
    try:
        return compare_ways(stack, batch)
    finally:
        for module in training:
            module.training = True


def compare_ways(stack: Stack, batch: dict[str, Tensor]) -> tuple[bool, str | None]:
    """The tower's outputs on one batch, with padding and without."""
    try:
        stack.enabled = False
        with torch.no_grad():
            plain = floats(stack.tower(**batch))
    except Exception:  # it needs inputs that are not known here
        return False, None
    finally:
        stack.enabled = True
    stack.outcomes.clear()
    try:
        with torch.no_grad():
            mine = floats(stack.tower(**batch))
    except Exception as error:
        return False, f"without padding it failed: {type(error).__name__}: {error}"
    if not any(key.startswith(("direct", "deferred")) for key in stack.outcomes):
        return False, next(iter(stack.outcomes), "plain: its layers were never reached").partition(": ")[2]
    difference = differs(stack, mine, plain, batch["attention_mask"].bool())
    if difference is None:
        prove_mask(stack, batch, plain)
    return difference is None, difference


def differs(stack: Stack, mine: dict[str, Tensor], plain: dict[str, Tensor], mask: Tensor) -> str | None:
    """In what the outputs for the real tokens differ, None where they don't."""
    for name, want in plain.items():
        got = mine.get(name)
        if got is None or got.shape != want.shape:
            return f"without padding its output {name} has another shape"
        if want.shape[:2] == mask.shape:
            want, got = want[mask], got[mask]
        if not is_same(got, want, has_int8(stack)):
            return f"without padding its output {name} differs from the plain model's"
    return None


def prove_mask(stack: Stack, batch: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """See whether the tower takes a bool mask, and hands that very tensor on to the layers' attention."""
    mask = batch["attention_mask"].bool()
    stack.probe, stack.passes_mask_on = mask, False
    try:
        with torch.no_grad():
            mine = floats(stack.tower(**{**batch, "attention_mask": mask}))
        stack.passes_mask_on = stack.passes_mask_on and differs(stack, mine, plain, mask) is None
    except Exception:  # it computes with the mask's numbers
        stack.passes_mask_on = False
    finally:
        stack.probe = None


def prove_late_embeddings(stack: Stack) -> bool:
    """Run the tower on a row with a hole, its embeddings put off and NaN in their place; keep it so if equal."""
    batch = probe_batch(stack.tower)
    if batch is None or stack.embeddings is None or not stack.passes_mask_on:
        return False
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mask[1, 2] = 0
    padding = getattr(stack.tower.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids[1, 2] = padding
    training = [module for module in stack.tower.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            stack.enabled = False
            plain = floats(stack.tower(**batch))
            stack.enabled = True
            stack.tower(**batch)  # shows the size of the embeddings
            stack.embeds_late = stack.is_proving = True
            mine = floats(stack.tower(**batch))
        # A forward that went another way has switched it off by itself.
        used = stack.embeds_late and stack.graphs.arena is not None and bool(stack.graphs.arena.inputs)
        stack.embeds_late = used and differs(stack, mine, plain, mask.bool()) is None
    except Exception:  # its embeddings want something else
        stack.embeds_late = False
    finally:
        stack.enabled, stack.is_proving = True, False
        for module in training:
            module.training = True
    return stack.embeds_late


def has_int8(stack: Stack) -> bool:
    """Whether a layer holds int8 weights."""
    return any(t.dtype == torch.int8 for layer in stack.layers for t in (*layer.parameters(), *layer.buffers()))


def is_same(got: Tensor, want: Tensor, int8: bool) -> bool:
    """Whether two results agree. In int8 which columns are outliers depends on every row of a call, padding included,
    so that the plain model too differs from itself by some percent: there the direction of each vector counts."""
    if int8:
        return bool(torch.cosine_similarity(got.float(), want.float(), dim=-1).min() >= INT8_COSINE)
    limit = TOLERANCE.get(want.dtype, 1e-4) * max(float(want.abs().max()), 1e-6)
    return bool((got - want).abs().max() <= limit)


def probe_batch(tower: nn.Module) -> dict[str, Tensor] | None:
    """Ids and mask [2, 8] for a tower that takes token ids; None for any other, and for one with no weights yet."""
    if getattr(tower, "main_input_name", None) != "input_ids":
        return None
    first = next(tower.parameters(), None)
    vocabulary = getattr(getattr(tower, "config", None), "vocab_size", None)
    if first is None or first.is_meta or not isinstance(vocabulary, int) or hasattr(tower, "hf_device_map"):
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 8), generator=generator)
    padding = getattr(tower.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids[ids == padding] = (padding + 1) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if isinstance(padding, int):
        ids[mask == 0] = padding
    model: Any = tower
    embeddings = model.get_input_embeddings()
    device = next(embeddings.parameters()).device if isinstance(embeddings, nn.Module) else first.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def floats(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a model's output, by name or place."""
    if isinstance(output, Tensor):
        return {"0": output} if output.is_floating_point() else {}
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return {str(name): v for name, v in items if isinstance(v, Tensor) and v.is_floating_point()}
