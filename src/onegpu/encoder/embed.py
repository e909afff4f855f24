"""`Encoder`: texts in, one vector per text out, in the order given.

    texts -> batching: Rows -> ids and mask on the device -> the model, without padding -> recipe.pool -> an array

On a GPU the host never waits for the device but to fetch finished vectors, one chunk behind: lengths are known before
anything is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from onegpu.attention.unpadded import UnpaddedBatch
from onegpu.config import check_choice
from onegpu.encoder.batching import Rows, Tokenize, batches, tokenized_chunks
from onegpu.encoder.optimize import encoder_report, known_batch, optimize_encoder
from onegpu.encoder.recipe import Recipe, pool, read_recipe
from onegpu.errors import ArgumentError, ConfigError, NotFoundError, OneGpuError

__all__ = ["Encoder"]

# Enough rows for full tiles on every multiprocessor of a large GPU; on a CPU, what stays in its caches.
TOKENS_PER_BATCH: Final = {"cuda": 16384, "cpu": 2048}
FORMATS: Final = ("numpy", "torch")
UNBOUNDED: Final = 10**6


class Encoder:
    """A Transformers text encoder with its tokenizer and pooling.

    Args:
        model: an encoder whose output has `last_hidden_state`; it is optimized in place, unless it already is.
        tokenizer: a Transformers tokenizer.
        recipe: pooling, normalisation, length; None for what the model's sentence-transformers files say, found by
            the model's own name if that is a folder, and mean pooling without normalisation where there are none.
        tokens_per_batch: real tokens per forward; None for a number that suits the device.

    Raises:
        ConfigError: a budget below 1, or a tokenizer without a padding token.
        UnsupportedError: a pooling or a further step that is not known here.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, recipe: Recipe | None = None, tokens_per_batch: int | None = None
    ) -> None:
        if tokens_per_batch is not None and tokens_per_batch < 1:
            raise ConfigError(f"tokens_per_batch must be at least 1; got {tokens_per_batch}")
        if recipe is None:
            folder = Path(str(getattr(model.config, "_name_or_path", "") or ""))
            recipe = (read_recipe(folder) if folder.is_dir() else None) or Recipe()
        if tokenizer.pad_token_id is None:
            raise ConfigError("the tokenizer has no padding token", "set tokenizer.pad_token")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.max_length = recipe.max_length or longest_input(model, tokenizer)
        self.budget = tokens_per_batch or TOKENS_PER_BATCH.get(self.device.type, TOKENS_PER_BATCH["cpu"])
        self.tokenize = Tokenize(tokenizer, self.max_length, recipe.prompt)
        if encoder_report(model) is None:
            optimize_encoder(model)

    @classmethod
    def from_pretrained(cls, name: str, *, device: str | None = None, **kwargs: Any) -> Encoder:
        """Load model, tokenizer and recipe from a folder or a Hub name.

        Args:
            device: where to run; None for the GPU if there is one. On a GPU the default dtype is float16.
            kwargs: for Transformers' `from_pretrained` (dtype, revision, trust_remote_code, ...), and
                `tokens_per_batch`, `recipe` for `Encoder`.

        Raises:
            NotFoundError: no such model.
            UnsupportedError: a pooling or a further step that is not known here.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        own = {key: kwargs.pop(key) for key in ("recipe", "tokens_per_batch") if key in kwargs}
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if where.startswith("cuda"):
            kwargs.setdefault("dtype", torch.float16)
        shared = {key: kwargs[key] for key in ("revision", "trust_remote_code", "cache_dir") if key in kwargs}
        try:
            if own.get("recipe") is None:
                own["recipe"] = find_recipe(name, **shared) or Recipe()
            AutoConfig.from_pretrained(name, **shared)  # says best what is missing
            tokenizer = AutoTokenizer.from_pretrained(name, **shared)
            model = AutoModel.from_pretrained(name, **kwargs).to(where)
        except OneGpuError:
            raise
        except (OSError, ValueError) as error:
            raise NotFoundError(f"no model {name!r}: {str(error).splitlines()[0]}") from error
        return cls(model, tokenizer, **own)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def encode(
        self, texts: str | Sequence[str], *, normalize: bool | None = None, to: str = "numpy", progress: bool = False
    ) -> Any:
        """Vectors of the texts, in their order.

        A text without any token (an empty string, where the tokenizer adds none of its own) has the zero vector.

        Args:
            texts: one text, or a sequence of them.
            normalize: to length 1; None for what the recipe says.
            to: `numpy` or `torch` (on the CPU).
            progress: show a bar of texts on stderr.

        Returns:
            float32 [N, hidden]; [hidden] for one text.

        Raises:
            ArgumentError: something that is not text.
            ConfigError: an unknown `to`.
        """
        check_choice("to", to, FORMATS)
        single = isinstance(texts, str)
        listed = [texts] if isinstance(texts, str) else list(texts)
        for place, text in enumerate(listed):
            if not isinstance(text, str):
                raise ArgumentError(f"texts must be strings; number {place} is {type(text).__name__}")
        recipe = self.recipe
        if normalize is not None and normalize != recipe.normalize:
            recipe = Recipe(recipe.pooling, normalize, recipe.max_length, recipe.prompt)
        out = self.run(listed, recipe, progress)
        if single:
            out = out[0]
        return out if to == "torch" else out.numpy()

    def run(self, texts: list[str], recipe: Recipe, progress: bool) -> Tensor:
        """float32 [N, hidden] on the CPU."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        out = torch.zeros(len(texts), self.model.config.hidden_size)
        if not texts:
            return out
        waiting: list[tuple[list[int], Tensor]] = []
        with tqdm(total=len(texts), disable=not progress, unit=" texts") as bar:
            for chunk in tokenized_chunks(texts, self.tokenize):
                done = waiting
                waiting = [(rows.places, self.forward(rows, recipe)) for rows in batches(chunk, self.budget)]
                store(out, done)
                bar.update(len(chunk.places))
            store(out, waiting)
        return out

    def forward(self, rows: Rows, recipe: Recipe) -> Tensor:
        """One batch: float32 [B, hidden] on the model's device."""
        lengths = [len(ids) for ids in rows.ids]
        longest = max(lengths)
        padding = self.tokenizer.pad_token_id
        padded = np.full((len(lengths), longest), padding, dtype=np.int64)
        real = np.arange(longest)[None] < np.array(lengths)[:, None]
        padded[real] = np.fromiter(itertools.chain.from_iterable(rows.ids), dtype=np.int64, count=sum(lengths))
        ids = to_device(torch.from_numpy(padded), self.device)
        counts = to_device(torch.tensor(lengths), self.device)
        mask = (torch.arange(longest, device=self.device)[None] < counts[:, None]).long()
        known_batch(self.model, UnpaddedBatch.from_lengths(lengths, longest, self.device))
        with torch.inference_mode():
            try:
                hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            finally:
                known_batch(self.model, None)
            return pool(hidden, counts, recipe)


def store(out: Tensor, finished: list[tuple[list[int], Tensor]]) -> None:
    """Fetch vectors and put each at its text's place."""
    if not finished:
        return
    places = [place for some, _ in finished for place in some]
    out[torch.tensor(places)] = torch.cat([vectors for _, vectors in finished]).cpu()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens that both the tokenizer and the model's positions allow."""
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        embeddings = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        offset = getattr(embeddings, "padding_idx", None)
        # RoBERTa's positions begin behind the padding's own.
        limits.append(positions if offset is None else positions - offset - 1)
    allowed = [limit for limit in limits if limit < UNBOUNDED]
    return min(allowed) if allowed else 512


def find_recipe(name: str, **kwargs: Any) -> Recipe | None:
    """The recipe of a folder or of a Hub repository."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return read_recipe(folder)
    from transformers.utils import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    shared = {key: value for key, value in kwargs.items() if key in ("revision", "cache_dir")}
    first = cached_file(name, "modules.json", **options, **shared)
    if first is None:
        return None
    modules = Path(first)
    for extra in ("sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"):
        cached_file(name, extra, **options, **shared)
    return read_recipe(modules.parent)
