"""Imports go down only, by the layers of the architecture, and importing radixkv loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "radixkv"

# The layer of each module or package directly below radixkv. Packages of one layer do not import each other.
LAYERS = {
    "types": 0, "config": 0, "errors": 0, "extras": 0, "paths": 0,
    "key": 1, "tree": 1, "pool": 1, "trace": 1,
    "events": 2, "transfer": 2, "storage": 2,
    "controller": 3, "mesh": 3,
    "router": 4,
    "hicache": 5, "engines": 5, "replay": 5,
    # What a person runs: above everything.
    "cli": 6, "__main__": 6, "doctor": 6, "metrics": 6, "demo": 6,
}  # fmt: skip

# Of one layer, but one is plainly below the other: key only encodes, and both others take keys.
ALLOWED = {
    ("tree", "key"), ("pool", "key"), ("cli", "metrics"), ("cli", "doctor"), ("cli", "demo"), ("demo", "metrics"),
    ("__main__", "cli"),
}  # fmt: skip

# Only the controller puts tree, pool, transfer and storage together.
COMPOSED = {"tree", "pool", "transfer", "storage"}
COMPOSERS = {"controller", "hicache", "engines", "replay", "cli", "demo", "doctor"}

# Nothing but the standard library and numpy may be imported when a module of these is loaded.
HEAVY = {"torch", "cupy", "matplotlib", "rich", "transformers", "zmq", "msgspec", "prometheus_client"}
HEAVY |= {"xxhash", "redis", "obstore", "mooncake", "nixl_cu13"}


PYTHON, CYTHON = (".py", ".pyi"), (".pyx", ".pxd")


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.p*") if path.suffix in PYTHON + CYTHON)


def parse(path: Path, text: str) -> ast.Module:
    """The syntax tree of a file; of a Cython file only its import lines, cimport read as import."""
    if path.suffix in CYTHON:
        joined = re.sub(r"\(([^()]*)\)", lambda inner: " ".join(inner[1].split()), text)  # one line an import
        lines = re.findall(r"^[ \t]*((?:from[ \t]+[\w.]+[ \t]+)?c?import[ \t]+[\w., \t*]+)", joined, re.MULTILINE)
        text = "\n".join(re.sub(r"\bcimport\b", "import", line).rstrip(" ,\t") for line in lines)
    return ast.parse(text)


def part_of(path: Path) -> str:
    """The module or package directly below radixkv that a file belongs to; "" for radixkv/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.split(".")[0]


def imported(tree: ast.AST, path: Path) -> list[tuple[str, int]]:
    """Absolute names of everything that a file imports, at any place in it, with the line."""
    package = ("radixkv", *path.relative_to(PACKAGE).parts[:-1])
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # from . import x may import a module x: count both
            names += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return names


def breaches(path: Path, text: str) -> list[str]:
    """What is wrong with the imports of one file."""
    mine = part_of(path)
    found = []
    for name, line in imported(parse(path, text), path):
        parts = name.split(".")
        if parts[0] != "radixkv" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        other = parts[1]
        if other not in LAYERS:
            # a name that radixkv/__init__.py defines; importing it from below would be a cycle
            if mine:
                found.append(f"{path}:{line}: {mine} imports radixkv.{other}, which has no layer")
            continue
        if not mine or other == mine:
            continue
        if LAYERS[other] > LAYERS[mine]:
            found.append(f"{path}:{line}: {mine} (L{LAYERS[mine]}) imports {other} (L{LAYERS[other]}) above it")
        elif LAYERS[other] == LAYERS[mine] and LAYERS[mine] and (mine, other) not in ALLOWED:
            found.append(f"{path}:{line}: {mine} and {other} are of one layer (L{LAYERS[mine]})")
    return found


def test_every_part_has_a_layer() -> None:
    parts = {part_of(path) for path in sources()} - {""}
    assert parts
    assert parts <= set(LAYERS), f"give {sorted(parts - set(LAYERS))} a layer"


def test_imports_go_down_only() -> None:
    found = [breach for path in sources() for breach in breaches(path, path.read_text())]
    assert not found, "\n".join(found)


def test_only_composers_put_tree_pool_transfer_and_storage_together() -> None:
    used: dict[str, set[str]] = {}
    for path in sources():
        names = [name.split(".") for name, _ in imported(parse(path, path.read_text()), path)]
        others = {parts[1] for parts in names if parts[0] == "radixkv" and len(parts) > 1}
        used.setdefault(part_of(path), set()).update(others & COMPOSED)
    mixed = {part: sorted(others - {part}) for part, others in used.items()
             if part and part not in COMPOSERS and len(others - {part}) > 1}  # fmt: skip
    assert not mixed


def test_heavy_modules_are_imported_inside_functions_only() -> None:
    found = []
    for path in sources():
        for node in parse(path, path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                heavy = {name.split(".")[0] for name, _ in imported(node, path)} & HEAVY
                if heavy and part_of(path) not in ("engines", "cli", "demo"):
                    found.append(f"{path}:{node.lineno}: {sorted(heavy)} at the top of a module")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("place", "text", "wrong"), [
    ("tree/core.py", "from ..controller import x", True),
    ("tree/core.py", "from radixkv.router import x", True),
    ("tree/core.py", "import radixkv.events", True),
    ("tree/core.py", "from .. import storage", True),
    ("tree/core.py", "def f():\n    from ..mesh import oplog", True),
    ("tree/core.py", "from ..pool import slots", True),
    ("pool/slots.py", "from ..tree.base import x", True),
    ("types.py", "from .key import x", True),
    ("transfer/cpu.py", "from ..storage.base import x", True),
    ("tree/core.py", "from .. import something", True),
    ("tree/core.py", "from ..key import x\nfrom ..types import y\nfrom .base import z\nimport numpy", False),
    ("errors.py", "from .types import x", False),
    ("controller.py", "from .tree import core\nfrom .pool import slots\nfrom .storage import base", False),
    ("engines/sglang.py", "from ..hicache import x", True),
    ("engines/sglang.py", "from ..controller import x\nfrom ..router import y", False),
    ("__init__.py", "from .tree.core import RadixTree", False),
    ("tree/core.pyx", "cdef int f(int x):\n    from ..controller import x", True),
    ("tree/core.pyx", "from ..pool.slots cimport (\n    a,\n    b,\n)\ncdef int x", True),
    ("tree/core.pyx", "cimport cython\nfrom libc.stdint cimport int64_t, int32_t\nfrom ..key import a as b", False),
])  # fmt: skip
def test_the_walk_itself(place: str, text: str, wrong: bool) -> None:
    assert bool(breaches(PACKAGE / place, text)) == wrong


def run(code: str) -> set[str]:
    """The modules that are loaded after running ``code`` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*sorted(sys.modules))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code", ["import radixkv", "import radixkv.tree.reference", "import radixkv.key", "import radixkv.cli"]
)
def test_importing_radixkv_loads_nothing_heavy(code: str) -> None:
    loaded = run(code)
    assert "radixkv" in loaded
    assert not loaded & HEAVY


def test_reading_tokens_does_not_import_torch() -> None:
    code = "from radixkv.tree.reference import ReferenceTree as T\nT(2).insert([1, 2], [0])"
    assert not run(code) & HEAVY
