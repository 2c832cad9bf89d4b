"""L5: what a replay measured, as one dictionary: the command line prints it as tables and writes it as JSON."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import numpy as np

from .. import __version__
from .replay import BaseReplay

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


def replay_report(replay: BaseReplay, *, trace: str, tree: str, finished: bool, wall_s: float) -> dict[str, Any]:
    """Everything about a run that a person or a script may ask for. Rates are fractions; None: nothing to divide by.

    ``tree.time_s`` is the time inside tree calls alone: no expansion, no allocator, no copy, no verification. With
    three tiers it is that of the controller's calls, and of waiting for copies and storage.
    """
    counters = replay.counters
    stats = replay.tree.stats()
    cached_tokens = replay.cached_tokens()
    tree_s = sum(sum(samples) for samples in replay.latencies_ns.values()) / 1e9
    hits = {tier: getattr(counters, f"{tier}_hit_tokens") for tier in replay.tiers}
    hit_tokens = sum(hits.values())
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
            tier: _ratio(tokens, counters.prompt_tokens) for tier, tokens in (hits | {"total": hit_tokens}).items()
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
    } | replay.more_figures()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
