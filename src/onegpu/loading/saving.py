"""From a quantized model to files: bitsandbytes' names and bytes, and a folder that is whole or as it was before."""

from __future__ import annotations

import copyreg
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.errors import SaveError
from onegpu.formats import QuantState, dequantize_absmax, to_tensors_4bit, to_tensors_8bit
from onegpu.nn import QuantExperts, QuantLinear, WeightSpec, dtype_named
from onegpu.nn.state import nested_of

__all__ = ["atomic_class", "disk_state", "plain_class", "replace_folder"]


def disk_state(model: nn.Module, expert_sources: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The model's state under the names that bitsandbytes writes.

    Args:
        expert_sources: for a stacked weight that the hub keeps as one tensor per expert, the names of those, with
            "{expert}" for the number; a stacked weight that is not in it is written as one tensor.
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if isinstance(module, QuantLinear):
            own = take(state, name, hook, {key: key for key in module.state})
            prefix = f"{name}." if name else ""
            state.update(named_on_disk(f"{prefix}weight", own, module.spec))
        elif isinstance(module, QuantExperts):
            for parameter, spec in module.expert_specs.items():
                names = {key: module.companion_name(parameter, key) for key in ("weight", *spec.companions)}
                own = take(state, name, hook, names)
                full_name = f"{name}.{parameter}" if name else parameter
                state.update(experts_on_disk(full_name, own, spec, expert_sources.get(full_name, ())))
    return state


def take(state: dict[str, Tensor], module_name: str, hook: Any, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Take a module's stored tensors out of the state dict; an offloaded one comes from where it waits."""
    taken = {}
    for key, own_name in names.items():
        tensor = state.pop(f"{module_name}.{own_name}" if module_name else own_name)
        if tensor.is_meta and getattr(hook, "weights_map", None) is not None:
            tensor = hook.weights_map[own_name]
        taken[key] = tensor
    return taken


def named_on_disk(parameter: str, own: dict[str, Tensor], spec: WeightSpec) -> dict[str, Tensor]:
    """One stored weight under the names on disk."""
    if spec.quant_type == "int8":
        if len(spec.shape) == 2:
            return to_tensors_8bit(parameter.removesuffix("weight").removesuffix("."), own["weight"], own["row_stats"])
        layout = torch.zeros((), dtype=torch.uint8)
        return {parameter: own["weight"], f"{parameter}.SCB": own["row_stats"], f"{parameter}.weight_format": layout}
    packed = own["weight"].view(torch.uint8).reshape(-1)
    absmax = nested_of(own) if spec.nested else own["absmax"]
    offset = float(own["nested_offset"]) if spec.nested else None
    described = QuantState(spec.quant_type, spec.blocksize, spec.dtype, spec.shape, offset)
    return to_tensors_4bit(parameter, packed, absmax, described, dtype_named(spec.quant_storage))


def experts_on_disk(
    full_name: str, own: dict[str, Tensor], spec: WeightSpec, sources: tuple[str, ...]
) -> dict[str, Tensor]:
    """A stacked weight as one tensor per expert where the hub keeps it so and blocks allow, else as one tensor."""
    num_parts = len(sources)
    rows = spec.shape[1] // num_parts if num_parts else 0
    numel = rows * spec.shape[2]
    if not num_parts or spec.shape[1] % num_parts or (spec.quant_type != "int8" and numel % (2 * spec.blocksize)):
        return named_on_disk(full_name, own, spec)
    if spec.nested:
        own = {"weight": own["weight"], "absmax": dequantize_absmax(nested_of(own))}
    part_spec = WeightSpec(spec.quant_type, (rows, spec.shape[2]), spec.dtype, spec.blocksize)
    shapes = part_spec.tensors()
    written: dict[str, Tensor] = {}
    per_part = {
        key: own[key]
        .view(torch.uint8 if key == "weight" and spec.quant_type != "int8" else own[key].dtype)
        .reshape(spec.num_experts, num_parts, -1)
        for key in shapes
    }
    for expert in range(spec.num_experts):
        for part, source in enumerate(sources):
            piece = {key: per_part[key][expert, part].contiguous().view(shape) for key, (shape, _) in shapes.items()}
            written.update(named_on_disk(source.format(expert=expert), piece, part_spec))
    return written


class AtomicSaving:
    """What the class of a loaded model gets before its own: saving into a folder beside, which then takes its place."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save as `PreTrainedModel.save_pretrained` does, with all its arguments, all of it or nothing.

        Raises:
            SaveError: the folder could not be written whole; what was in it before is still there.
        """
        plain_save = super().save_pretrained  # type: ignore[misc]
        if kwargs.get("push_to_hub"):
            # Transformers writes, compares and uploads one folder: it must be the real one.
            return plain_save(save_directory, *args, **kwargs)
        with replace_folder(Path(save_directory)) as folder:
            plain_save(folder, *args, **kwargs)
        return None


def atomic_class(base: Any) -> Any:
    """The subclass of a model's class that saves atomically; the same name, module and everything else.

    An attribute on the model itself could not do it: it would have to hold the model, and a model that is held by what
    it holds is not freed when it is deleted.
    """
    return make_class(base)


@cache
def make_class(base: Any) -> Any:
    made = type(base.__name__, (AtomicSaving, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    copyreg.pickle(made, reduce_model)
    return made


def reduce_model(model: Any) -> tuple[Any, ...]:
    """Copy and pickle by the class that can be imported, not by the one made here."""
    return rebuild_model, (plain_class(type(model)),), model.__dict__


def rebuild_model(base: type[Any]) -> Any:
    """An empty model of the class made from `base`."""
    return object.__new__(atomic_class(base))


def plain_class(cls: type[Any]) -> Any:
    """The class that `atomic_class` was given."""
    return cls.__mro__[2] if AtomicSaving in cls.__bases__ else cls


class replace_folder:  # noqa: N801  (a context manager, used as a verb)
    """A temporary folder beside `target`; on leaving, its files take their places in `target`, all or none.

    Shards of an earlier save that the new one does not have are removed, other files stay.

    Raises:
        SaveError: when writing or moving fails, with the system's reason; `target` is as it was before.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.target.exists() and not self.target.is_dir():
                raise NotADirectoryError(f"{self.target} is a file")
            made = tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".saving", dir=self.target.parent)
        except OSError as error:
            raise save_error(self.target, error) from error
        self.folder = Path(made)
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self.move_in()
        except OSError as failure:
            raise save_error(self.target, failure) from failure
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if error is not None and is_io_error(error):
            raise save_error(self.target, error) from error

    def move_in(self) -> None:
        """Move every new file to its place; on a failure put the old ones back."""
        new = sorted(path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        if not self.target.exists():
            os.chmod(self.folder, 0o777 & ~current_umask())
            os.rename(self.folder, self.target)
            return
        stale = [
            path.relative_to(self.target)
            for path in self.target.iterdir()
            if path.is_file() and is_weights(path.name) and path.relative_to(self.target) not in new
        ]
        backup = Path(tempfile.mkdtemp(prefix=".old.", dir=self.folder))
        aside: list[Path] = []
        placed: list[Path] = []
        try:
            for name in [*stale, *new]:
                if (self.target / name).exists():
                    move(self.target / name, backup / name)
                    aside.append(name)
                if name in new:
                    move(self.folder / name, self.target / name)
                    placed.append(name)
        except OSError:
            for name in placed:
                (self.target / name).unlink()
            for name in aside:
                move(backup / name, self.target / name)
            raise


def move(source: Path, destination: Path) -> None:
    """Move one file within a file system, making the folder it goes to."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, destination)


def is_weights(name: str) -> bool:
    """Whether a file is one that an earlier save may have left and a new one supersedes."""
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def is_io_error(error: BaseException) -> bool:
    """Whether saving failed for the disk's sake; safetensors wraps such errors in its own."""
    return isinstance(error, OSError) or (
        type(error).__name__ == "SafetensorError" and any(word in str(error) for word in ("I/O", "Io", "os error"))
    )


def save_error(target: Path, error: BaseException) -> SaveError:
    """The error for a save that failed, with what the system said."""
    return SaveError(
        f"the model could not be saved to {target}: {error}",
        "free space or choose a folder you may write to; what was in the folder before is unchanged",
    )


def current_umask() -> int:
    """The process's mask for new files, which mkdtemp does not follow."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
