"""`onegpu eval` for a model that makes vectors: each format's embeddings beside those in 16 bit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

__all__ = ["is_encoder", "likeness_table", "score_encoder"]


def is_encoder(config: Any) -> bool:
    """Whether a Transformers config describes a model that reads and does not write."""
    from onegpu.errors import ConfigError
    from onegpu.memory.geometry import read_geometry

    try:
        return read_geometry(config.to_dict()).kind == "encoder"
    except ConfigError:
        return False


def score_encoder(
    contenders: Any,
    name: Any,
    where: str,
    trust_remote_code: bool,
    tokenizer: Any,
    words: str,
    max_tokens: int | None,
) -> tuple[list[dict[str, object]], Any]:
    """One row per contender, and the 16-bit model they were held against."""
    from onegpu.bench.contenders import parse_contender
    from onegpu.bench.evaluate_encoder import compare_embeddings, embeddings, split_texts
    from onegpu.cli.console import progress_bar, say
    from onegpu.encoder.embed import find_recipe
    from onegpu.encoder.recipe import Recipe

    texts = limited(tokenizer, split_texts(words), max_tokens)
    hub = name.arguments(trust_remote_code)
    recipe = find_recipe(name.name, **hub) or Recipe()
    say(f"{len(texts)} texts, {recipe.pooling} pooling{', normalised' if recipe.normalize else ''}")
    arguments = hub | {"auto": "AutoModel", "device_map": where}
    reference = parse_contender("16bit").load(name.name, **arguments)
    expected = embeddings(reference, tokenizer, recipe, texts)
    rows = []
    with progress_bar(len(contenders), "formats") as bar:
        for contender in contenders:
            same = contender.label == "16bit"
            model = reference if same else contender.load(name.name, **arguments)
            vectors = expected if same else embeddings(model, tokenizer, recipe, texts)
            rows.append(
                {"format": contender.label, **asdict(compare_embeddings(model, vectors, None if same else expected))}
            )
            bar.update(1)
            del model
    return rows, reference


def limited(tokenizer: Any, texts: list[str], max_tokens: int | None) -> list[str]:
    """The first texts of together no more than `max_tokens` tokens, but at least two."""
    if max_tokens is None:
        return texts
    total = 0
    for place, text in enumerate(texts):
        total += len(tokenizer(text, verbose=False)["input_ids"])
        if total > max_tokens and place >= 2:
            return texts[:place]
    return texts


def likeness_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| format | weights, MiB | mean cosine | smallest cosine | same nearest |", "| --- " * 5 + "|"]
    for row in rows:
        if row["mean_cosine"] is None:
            cells = ["-"] * 3
        else:
            cells = [f"{row['mean_cosine']:.6f}", f"{row['smallest_cosine']:.6f}", f"{100 * row['same_nearest']:.2f} %"]
        lines.append(f"| {row['format']} | {row['weight_bytes'] / 2**20:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
