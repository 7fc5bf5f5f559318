"""Imports point one way, so that a change stays in its room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"errors", "config", "jobs", "sampling", "infotext", "weighted", "metrics", "logs", "tracing", "garbage"}
# What each room and each shared module may import of Darkroom, besides itself.
ALLOWED: dict[str, set[str]] = {
    "api": {"queue", *SHARED},
    "queue": SHARED,
    # The worker loads the models that it hands to its engine.
    "worker": {"engine", "queue", "diffusion", *SHARED},
    # The engine's tick ends in the fused sampler update, which is a kernel.
    "engine": {"diffusion", "darkroom_kernels", *SHARED},
    "diffusion": {"darkroom_kernels", *SHARED},
    "darkroom_kernels": set(),
    "errors": set(),
    "config": {"errors"},
    "jobs": {"errors"},
    "sampling": {"errors"},
    "infotext": {"jobs"},
    "weighted": set(),
    "metrics": {"errors"},
    "logs": set(),
    "garbage": set(),
    "tracing": {"errors", "config", "jobs"},
    "supervisor": {"errors"},
    # The command line may use every room; no room may use it.
    "up": {"queue", "supervisor", *SHARED},
    "generate": {"api", "engine", "worker", *SHARED},
    "keys": {"queue", *SHARED},
    "cli": {"api", "queue", "worker", "supervisor", "up", "generate", "keys", "darkroom_kernels", *SHARED},
    "__main__": {"cli"},
    "__init__": set(),
}
# Heavy or risky libraries, and the only places that may import them.
ONLY_IN: dict[str, set[str]] = {
    "torch": {"worker", "engine", "diffusion", "darkroom_kernels"},
    "triton": {"darkroom_kernels"},
    "xformers": {"darkroom_kernels"},
    "transformers": {"diffusion"},
    "safetensors": {"diffusion"},
    "PIL": {"diffusion", "api"},
    "fastapi": {"api"},
    "starlette": {"api"},
    "uvicorn": {"api"},
    "redis": {"queue"},
    "obstore": {"queue"},
    "opentelemetry": {"tracing"},
    "pynvml": {"worker"},
    "c2pa": {"diffusion"},
    "cryptography": {"diffusion"},
    "diffusers": set(),
    "pickle": set(),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every source file with the room, or the module beside the rooms, that it belongs to."""
    for base in (ROOT / "server" / "darkroom", ROOT / "kernels"):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            yield parts[0], path


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            # `from darkroom import metrics` names a module, `from darkroom import __version__` does not.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def of_darkroom(names: set[str]) -> set[str]:
    """The rooms and modules of ours among dotted names."""
    found = set()
    for name in names:
        first, _, rest = name.partition(".")
        if first == "darkroom_kernels":
            found.add(first)
        elif first == "darkroom" and rest and rest != "__version__":
            found.add(rest.split(".")[0])
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    for owner, path in modules():
        if owner == room:
            strays = of_darkroom(imported(path)) - ALLOWED[room] - {room}
            assert not strays, f"{path.relative_to(ROOT)} imports {', '.join(sorted(strays))}"


def test_every_module_has_its_place() -> None:
    assert {owner for owner, _ in modules()} <= set(ALLOWED)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    for owner, path in modules():
        if any(name.split(".")[0] == library for name in imported(path)):
            assert owner in ONLY_IN[library], f"{path.relative_to(ROOT)} imports {library}"


@pytest.mark.parametrize(
    "module",
    [
        "darkroom.api.server",
        "darkroom.queue",
        "darkroom.engine.batcher",
        "darkroom.cli",
        "darkroom.up",
        "darkroom.logs",
    ],
)
def test_what_runs_without_a_model_loads_no_torch(module: str) -> None:
    """The API's container carries no torch, and the command line must answer at once."""
    heavy = {"torch", "transformers", "PIL", "numpy", "obstore"}
    code = f"import {module}, sys; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
