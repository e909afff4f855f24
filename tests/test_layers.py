"""Imports go strictly down the layers of DESIGN.md, and siblings never meet."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "onegpu"

LAYERS = {
    "errors": 0,
    "config": 0,
    "formats": 1,
    "kernels": 2,
    "nn": 3,
    "attention": 3,
    "memory": 3,
    "loading": 4,
    "encoder": 5,
    "decoder": 5,
    "fastpath": 6,
    "serve": 6,
    "compat": 7,
    "bench": 7,
    "reporting": 7,
    "diagnosis": 7,
    "cli": 8,
}
WITHIN_L0 = {("config", "errors")}
# Only these may import the named third party, so that the heavy or moving ones stay at one border.
OWNERS = {
    "triton": {"kernels"},
    "llvmlite": {"kernels"},
    "transformers": {"attention", "loading", "compat", "encoder", "decoder", "bench", "cli"},
    "accelerate": {"loading", "memory"},
    "typer": {"cli"},
    "rich": {"cli", "bench", "reporting"},
    "matplotlib": {"bench"},
    "lm_eval": {"bench"},
}
FORBIDDEN = {"pickle", "bitsandbytes", "flash_attn"}


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute module names imported anywhere in a file, with their lines."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the absolute import"
            if node.module == "onegpu":
                found += [(f"onegpu.{alias.name}", node.lineno) for alias in node.names]
            elif node.module:
                found.append((node.module, node.lineno))
    return found


def violations(path: Path) -> list[str]:
    package = package_of(path)
    out = []
    for name, line in imports(path):
        where = f"{path.relative_to(SOURCE)}:{line}"
        root, _, rest = name.partition(".")
        if root in FORBIDDEN:
            out.append(f"{where} imports {root}, which nothing here may")
        if root in OWNERS and package not in OWNERS[root]:
            out.append(f"{where} imports {root}; only {sorted(OWNERS[root])} may")
        if root != "onegpu" or package == "__init__":
            continue
        target = rest.split(".")[0]
        if target not in LAYERS:
            out.append(f"{where} imports onegpu.{target}, which is in no layer")
        elif target != package and LAYERS[target] >= LAYERS[package] and (package, target) not in WITHIN_L0:
            out.append(f"{where} imports {target} (L{LAYERS[target]}) from {package} (L{LAYERS[package]})")
    return out


def test_imports_go_down() -> None:
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if package_of(path) != "__init__"]
    found = [line for path in paths for line in violations(path)]
    assert not found, "\n".join(found)


def test_every_package_has_a_layer() -> None:
    for path in SOURCE.iterdir():
        name = path.name.removesuffix(".py")
        if not name.startswith("__") and (path.is_dir() or path.suffix == ".py") and name != "py.typed":
            assert name in LAYERS, f"{name} is in no layer"


@pytest.mark.parametrize(
    ("package", "line"),
    [("formats", "import onegpu.kernels"), ("nn", "from onegpu.memory import plan"), ("nn", "import triton")],
)
def test_a_bad_import_is_seen(package: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / package / "bad.py"
    bad.parent.mkdir()
    bad.write_text(line)
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    assert violations(bad)
