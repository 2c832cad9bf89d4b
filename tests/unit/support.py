"""Shared by the tests of replay, plan and trace: the conversation trace, the trees, small traces."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radixkv.cli import load_tree
from radixkv.replay.replay import Replay, ReplayConfig
from radixkv.replay.workload import WorkloadConfig, generate
from radixkv.trace import TraceRequest

HAS_CORE = importlib.util.find_spec("radixkv.tree.core") is not None
BEST_TREE = "core" if HAS_CORE else "reference"
TREES = [
    pytest.param("reference"),
    pytest.param("core", marks=pytest.mark.skipif(not HAS_CORE, reason="radixkv.tree.core is not built")),
]


def real_trace() -> Path:
    """The conversation trace, beside the repository or where RADIXKV_TRACE says; skips the test without it."""
    default = Path(__file__).parents[2].parent / "shared" / "traces" / "conversation_trace.jsonl"
    path = Path(os.environ.get("RADIXKV_TRACE", default))
    if not path.exists():
        pytest.skip(f"the conversation trace is not at {path}; set RADIXKV_TRACE")
    return path


def workload(requests: int = 120, kind: str = "mixed", **options: Any) -> list[TraceRequest]:
    """A generated trace with small blocks and short prompts, so that the reference tree is quick enough."""
    options = {"max_input_tokens": 12_000, "block_tokens": 64, "seed": 3} | options
    return list(generate(WorkloadConfig(kind=kind, requests=requests, **options)))


def make_replay(tree: str | Callable[..., Any], **options: Any) -> Replay:
    options = {"device_pages": 20_000, "block_tokens": 64} | options
    return Replay(load_tree(tree) if isinstance(tree, str) else tree, ReplayConfig(**options))
