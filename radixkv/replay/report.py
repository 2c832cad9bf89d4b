"""L5: what a replay measured, as one dictionary: the command line prints it as tables and writes it as JSON."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import numpy as np

from .. import __version__
from .replay import Replay

__all__ = ["PERCENTILES", "latency_summary", "replay_report"]

PERCENTILES = (50, 90, 99)


def latency_summary(samples_ns: list[int]) -> dict[str, float]:
    """count, total_ms, and p50 / p90 / p99 / max in microseconds; the latter are absent if there is no sample."""
    summary: dict[str, float] = {"count": len(samples_ns), "total_ms": sum(samples_ns) / 1e6}
    if samples_ns:
        values = np.percentile(np.array(samples_ns), PERCENTILES)
        summary |= {f"p{p}_us": float(value) / 1e3 for p, value in zip(PERCENTILES, values, strict=True)}
        summary["max_us"] = max(samples_ns) / 1e3
    return summary


def replay_report(replay: Replay, *, trace: str, tree: str, finished: bool, wall_s: float) -> dict[str, Any]:
    """Everything about a run that a person or a script may ask for. Rates are fractions; None: nothing to divide by.

    ``tree.time_s`` is the time inside tree calls alone: no expansion, no allocator, no copy, no verification.
    """
    counters = replay.counters
    stats = replay.tree.stats()
    cached_tokens = replay.cached_tokens()
    tree_s = sum(sum(samples) for samples in replay.latencies_ns.values()) / 1e9
    hit_tokens = counters.device_hit_tokens + counters.host_hit_tokens
    return {
        "radixkv": __version__,
        "python": platform.python_version(),
        "trace": trace,
        "finished": finished,
        "wall_s": wall_s,
        "config": {"tree": tree} | dataclasses.asdict(replay.config),
        "counters": dataclasses.asdict(counters),
        "hit_tokens": hit_tokens,
        "hit_rate": {
            "device": _ratio(counters.device_hit_tokens, counters.prompt_tokens),
            "host": _ratio(counters.host_hit_tokens, counters.prompt_tokens),
            "total": _ratio(hit_tokens, counters.prompt_tokens),
        },
        "tree": {
            "time_s": tree_s,
            "tokens_per_s": _ratio(counters.prompt_tokens, tree_s),
            "nodes": stats.nodes,
            "device_tokens": stats.evictable_tokens + stats.protected_tokens,
            "host_tokens": stats.host_tokens,
            "cached_tokens": cached_tokens,
            "memory_bytes": stats.memory_bytes,
            "memory_bytes_per_cached_token": _ratio(stats.memory_bytes, cached_tokens),
        },
        "latency": {kind: latency_summary(samples) for kind, samples in replay.latencies_ns.items()},
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
