"""From names and shapes to bytes: what the loader makes of each tensor of a checkpoint, in each format.

The rules are those of `onegpu.nn` and `onegpu.loading`, told by name and shape instead of by module: matrices of linear
layers are quantized, stacked or per-expert weights of mixture-of-experts layers as one stacked weight, while
embeddings, output heads, routers, norms and biases stay in 16 bit. A tied head is there once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onegpu.config import DEFAULT_BLOCKSIZE, NESTED_BLOCKSIZE
from onegpu.memory.geometry import text_part
from onegpu.memory.source import TensorInfo

__all__ = ["FORMATS", "Weight", "bytes_in", "read_weights", "stored_weights"]

FORMATS = ("16bit", "int8", "nf4", "nf4+double", "fp4", "fp4+double")

# ProphetNet's relative_pos_embeddings is a linear layer.
EMBEDDING = re.compile(
    r"(?!relative_pos_)(w[tp]e|shared|embed|emb|embeddings?|embed_\w+|\w*_embeddings?|\w+_embed|relative_attention_bias)"
)
HEAD = re.compile(r"lm_head|embed_out|output_projection|score")
ROUTER = re.compile(r"gate|router|wg")
EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(?:\w+\.)*?(\w+)\.weight")
STACKED = re.compile(r".*\bexperts\.\w+")
DOWN = ("w2", "down_proj", "fc2", "dense_4h_to_h")
LEFT_OUT = re.compile(r".*(rotary_emb\.inv_freq|masked_bias|position_ids|rotary_pos_emb\.inv_freq)|mtp\..*")
# What a model's class keeps out of quantization, by model_type: modules it wants in float32.
KEPT_BY_MODEL = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), "wo"),
    **dict.fromkeys(("blip-2", "instructblip"), "qformer"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "weights_proj"),
}
# GPT-2's Conv1D holds its weight transposed, [in, out].
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# What bitsandbytes keeps beside a weight: scales, and what describes it, which is not kept once it is read.
COMPANIONS = (".nested_absmax", ".absmax", ".SCB")
DESCRIPTION = re.compile(r"\.(nested_)?quant_(map|state)|\.weight_format$")


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter as the loader makes it.

    `role` is "matrix", "experts", "embedding", "head" or "kept". `rows` are the scales it has in int8. `tied` says
    that an embedding is the output head as well. `as_one` says that the experts are one tensor in the file, whose
    structure is not known: it may be transposed, or have biases. `stored` are the bytes of what is quantized in the
    file already.
    """

    name: str
    role: str
    numel: int
    rows: int = 0
    experts: int = 1
    tied: bool = False
    as_one: bool = False
    stored: int | None = None


def read_weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[Weight]:
    """What becomes of each tensor of a 16- or 32-bit checkpoint."""
    text = text_part(config)
    model_type = str(config.get("model_type"))
    kept_by_model = KEPT_BY_MODEL.get(model_type)
    transposed = str(text.get("model_type")) in TRANSPOSED
    heads = {name for name in tensors if HEAD.fullmatch(component(name)) and name.endswith(".weight")}
    tied = is_tied(config, heads)
    layers = text.get("num_hidden_layers")
    weights: list[Weight] = []
    experts: dict[tuple[str, str], list[TensorInfo]] = {}
    for name, info in tensors.items():
        parts = name.split(".")
        if LEFT_OUT.fullmatch(name) or (name.endswith(".attn.bias") and len(info.shape) == 4):
            continue
        if beyond_last_layer(parts, layers) or (tied and name in heads and text.get("vocab_size") in info.shape):
            continue
        if found := EXPERT.fullmatch(name):
            experts.setdefault((found[1], "down" if found[3] in DOWN else "up"), []).append(info)
        elif kept_by_model is not None and kept_by_model in parts:
            weights.append(Weight(name, "kept", info.numel))
        elif len(info.shape) == 3 and STACKED.fullmatch(name):
            rows = info.shape[0] * info.shape[1]
            weights.append(Weight(name, "experts", info.numel, rows, info.shape[0], as_one=True))
        else:
            role = role_of(name, info, text)
            rows = info.shape[1 if transposed else 0] if role == "matrix" else 0
            is_tied_table = role == "embedding" and tied and text.get("vocab_size") in info.shape
            weights.append(Weight(name, role, info.numel, rows, tied=is_tied_table))
    for (prefix, part), infos in experts.items():
        if len(infos[0].shape) != 2:  # biases of experts
            weights.append(Weight(f"{prefix}.{part}", "kept", sum(info.numel for info in infos)))
            continue
        count = number_of_experts(tensors, prefix)
        rows = sum(info.shape[0] for info in infos)
        weights.append(Weight(f"{prefix}.{part}", "experts", sum(info.numel for info in infos), rows, count))
    return weights


def component(name: str) -> str:
    """The module a parameter belongs to, without the path to it: "q_proj" of "model.layers.0.q_proj.weight"."""
    return name.split(".")[-2] if "." in name else ""


def is_tied(config: Mapping[str, Any], heads: Iterable[str]) -> bool:
    """Whether the output head is the embedding table: as the config says, or because the file has no head."""
    said = config.get("tie_word_embeddings", text_part(config).get("tie_word_embeddings"))
    return said is True or not list(heads)


def beyond_last_layer(parts: list[str], layers: Any) -> bool:
    """Whether a tensor is of a layer after the last one, where some checkpoints predict further tokens."""
    if not isinstance(layers, int) or "layers" not in parts[:-1]:
        return False
    index = parts[parts.index("layers") + 1]
    return parts[0] == "model" and parts.index("layers") == 1 and index.isdigit() and int(index) >= layers


def role_of(name: str, info: TensorInfo, text: Mapping[str, Any]) -> str:
    """The role of a tensor that belongs to no expert."""
    if len(info.shape) != 2 or not name.endswith(".weight") or not info.is_float:
        return "kept"
    module = component(name)
    if HEAD.fullmatch(module):
        return "head"
    if EMBEDDING.fullmatch(module):
        return "embedding"
    if info.shape[0] == text.get("vocab_size") and info.shape[0] > 2 * info.shape[1]:
        return "head" if module in ("decoder", "output", "proj_out") else "embedding"
    if ROUTER.fullmatch(module) and info.shape[0] <= 1024 and has_experts(text):
        return "kept"
    return "matrix"


def has_experts(text: Mapping[str, Any]) -> bool:
    return any("expert" in name for name in text)


def number_of_experts(tensors: Mapping[str, TensorInfo], prefix: str) -> int:
    """How many experts a layer has."""
    start = len(prefix) + 1
    return len({name[start:].partition(".")[0] for name in tensors if name.startswith(f"{prefix}.")})


def bytes_in(weight: Weight, format: str, blocksize: int = DEFAULT_BLOCKSIZE) -> int:
    """Bytes of one parameter on the device, with its scales."""
    if weight.stored is not None:
        return weight.stored
    if format == "16bit" or weight.role not in ("matrix", "experts"):
        return 2 * weight.numel
    if format == "int8":
        return weight.numel + 4 * weight.rows
    if weight.role == "experts" and (weight.numel // weight.experts) % blocksize:
        return 2 * weight.numel  # blocks never straddle experts, so it is left alone
    num_blocks = -(-weight.numel // blocksize)
    packed = (weight.numel + 1) // 2
    if not format.endswith("+double"):
        return packed + 4 * num_blocks
    return packed + num_blocks + 4 * -(-num_blocks // NESTED_BLOCKSIZE) + 4 * 256 + 4


def stored_weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[Weight]:
    """What becomes of the tensors of a checkpoint that bitsandbytes' formats are in already."""
    nested = {name.removesuffix(".nested_absmax") for name in tensors if name.endswith(".nested_absmax")}
    codes = {base for name in tensors for base in (name.removesuffix(".absmax"),) if base != name}
    codes |= {base for name in tensors if name.endswith(".SCB") for base in (coded(name, tensors),)}
    weights: list[Weight] = []
    plain: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        suffix = next((suffix for suffix in COMPANIONS if name.endswith(suffix)), "")
        name_kept, role = stored_role(name.removesuffix(suffix))
        merged = role == "experts" and name_kept != name.removesuffix(suffix)
        if name in codes:
            numel = info.numel if info.dtype == "I8" and f"{name}.absmax" not in tensors else 2 * info.num_bytes
            extra = 4 * 256 + 4 if name in nested and not merged else 0
            weights.append(Weight(name_kept, role, numel, stored=info.num_bytes + extra))
        elif suffix:
            # Experts that are merged while loading have their scales in float32.
            size = (0 if suffix == ".nested_absmax" else 4 * info.numel) if merged else info.num_bytes
            weights.append(Weight(name_kept, role, 0, stored=size))
        elif not DESCRIPTION.search(name):
            plain[name] = info
    for weight in read_weights(plain, config):
        role = "kept" if weight.role in ("matrix", "experts") else weight.role
        weights.append(Weight(weight.name, role, weight.numel, tied=weight.tied))
    return weights


def coded(scales: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The 8-bit weight that `scales` belong to: beside them in a linear layer, above them in a stacked weight."""
    module = scales.removesuffix(".SCB")
    return f"{module}.weight" if f"{module}.weight" in tensors else module


def stored_role(name: str) -> tuple[str, str]:
    """The name under which a quantized weight counts, and its role: the experts of a layer count as one."""
    bare = name if name.endswith(".weight") else f"{name}.weight"
    if found := EXPERT.fullmatch(bare):
        return f"{found[1]}.{'down' if found[3] in DOWN else 'up'}", "experts"
    return name, "experts" if STACKED.fullmatch(name) else "matrix"
