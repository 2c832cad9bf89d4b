"""L5: tables for people. rich is optional (the extra ``cli``) and imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from .. import extras
from ..errors import MissingExtraError
from .plan import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..trace import TraceSummary

__all__ = [
    "GIB",
    "KNEES",
    "MissingExtraError",
    "new_table",
    "percent",
    "plan_tables",
    "print_all",
    "replay_tables",
    "require",
    "workload_table",
]

KNEES = (0.5, 0.8, 0.9, 0.95, 0.99)
GIB = 2**30


def require(module: str, purpose: str) -> Any:
    """Import a module of the extra ``cli``. Raises: MissingExtraError."""
    return extras.require(module, purpose, "cli")


def new_table(title: str, *columns: str, first: Literal["left", "right"] = "left") -> Table:
    """A table whose first column is text, unless told else, and whose others are numbers."""
    box = require("rich.box", "a table").SIMPLE_HEAD
    table: Table = require("rich.table", "a table").Table(
        title=title, title_justify="left", title_style="bold", box=box, show_edge=False, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify=first if i == 0 else "right", overflow="fold")
    return table


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


# ---- replay ----------------------------------------------------------------------------------------------------------
def replay_tables(report: dict[str, Any]) -> list[RenderableType]:
    """The report of ``report.replay_report`` as tables: hits by tier, latencies, the rest."""
    counters, config = report["counters"], report["config"]
    title = f"{report['trace']}: {counters['requests']:,} requests" + ("" if report["finished"] else " (interrupted)")
    hits = new_table(title, "tier", "capacity tokens", "hit tokens", "hit rate")
    for tier in (tier for tier in report["hit_rate"] if tier != "total"):
        capacity = _capacity(config, tier)
        hits.add_row(tier, capacity, f"{counters[f'{tier}_hit_tokens']:,}", percent(report["hit_rate"][tier]))
    hits.add_section()
    hits.add_row(
        "total", f"of {counters['prompt_tokens']:,}", f"{report['hit_tokens']:,}", percent(report["hit_rate"]["total"])
    )
    return [hits, _latency_table(report), _facts_table(report)]


def _capacity(config: dict[str, Any], tier: str) -> str:
    """In tokens; of the storage tier in bytes."""
    if tier == "storage":
        return f"{config['storage_bytes']:,} bytes" if config["storage_bytes"] else "no limit"
    pages = config[f"{tier}_pages"]
    return f"{pages * config['page_size']:,}" if pages else "none"


def _latency_table(report: dict[str, Any]) -> Table:
    config = report["config"]
    where = "controller, waits included" if "storage" in config else "tree"
    table = new_table(
        f"time in the {where} ({config['tree']}, {config['policy']}, page {config['page_size']}), microseconds",
        "call", "calls", "p50", "p90", "p99", "max", "total ms",
    )  # fmt: skip
    for kind, summary in report["latency"].items():
        if summary["count"]:
            values = [f"{summary[name]:,.1f}" for name in ("p50_us", "p90_us", "p99_us", "max_us")]
            table.add_row(kind.replace("_", " "), f"{summary['count']:,}", *values, f"{summary['total_ms']:,.1f}")
    return table


def _facts_table(report: dict[str, Any]) -> Table:
    counters, config, tree = report["counters"], report["config"], report["tree"]
    table = new_table("the run", "figure", "value")
    speed, memory = tree["tokens_per_s"], tree["memory_bytes_per_cached_token"]
    pages = f"{counters['verified_pages']:,}"
    bytes_per_page = config["page_size"] * config["bytes_per_token"]
    part = "controller" if "storage" in config else "tree"
    rows = [
        (f"tokens a second in the {part}", "-" if speed is None else f"{speed:,.0f}"),
        (f"time in the {part} / of the run", f"{tree['time_s']:.3f} s / {report['wall_s']:.1f} s"),
        ("tokens cached at the end", f"{tree['cached_tokens']:,} in {tree['nodes']:,} nodes"),
        ("tree memory a cached token", "-" if memory is None else f"{memory:.2f} bytes"),
        ("pages verified", f"{pages} of {bytes_per_page:,} bytes" if config["verify"] else "none (--no-verify)"),
    ]
    optional = [
        ("tokens evicted from the device", "evicted_tokens"),
        ("tokens backed up to the host", "backed_up_tokens"),
        ("tokens loaded back", "loaded_back_tokens"),
        ("tokens not backed up, host full", "dropped_tokens"),
        ("requests too long for the device", "uncached_requests"),
    ]
    rows += [(label, f"{counters[name]:,}") for label, name in optional if counters[name]]
    if storage := report.get("storage"):
        wrong = sum(storage[name] for name in ("corrupt", "foreign", "short"))
        rows.append(("tokens written to storage", f"{counters['stored_tokens']:,}"))
        rows.append(("tokens brought from storage", f"{counters['prefetched_tokens']:,}"))
        rows.append(("pages read, missing, wrong", f"{storage['hits']:,}, {storage['misses']:,}, {wrong:,}"))
    for row in rows:
        table.add_row(*row)
    return table


# ---- workload --------------------------------------------------------------------------------------------------------
def workload_table(summary: TraceSummary, kind: str, seed: int, duration_ms: float) -> Table:
    """What was generated."""
    table = new_table(f"workload {kind}, seed {seed}", "figure", "value")
    requests = max(summary.requests, 1)
    rate = summary.hit_tokens / summary.input_tokens if summary.input_tokens else None
    for row in (
        ("requests", f"{summary.requests:,} in {duration_ms / 1000:,.0f} s"),
        ("prompt tokens", f"{summary.input_tokens:,} ({summary.input_tokens / requests:,.0f} a request)"),
        ("response tokens", f"{summary.output_tokens:,} ({summary.output_tokens / requests:,.0f} a request)"),
        ("reuse, unbounded cache", percent(rate)),
        ("distinct prompt tokens", f"{summary.cached_tokens:,}"),
    ):
        table.add_row(*row)
    return table


# ---- plan ------------------------------------------------------------------------------------------------------------
def plan_tables(plan: Plan, bytes_per_token: int, device_tokens: int = 0) -> list[RenderableType]:
    """Hit rate against capacity, and the sizes that reach a share of the achievable."""
    curve = new_table(
        f"hit rate by capacity: {plan.tokens:,} prompt tokens, {plan.requests:,} requests",
        "capacity tokens", f"GiB at {bytes_per_token:,} B", "LRU", "clairvoyant bound", "LRU / bound", first="right",
    )  # fmt: skip
    for capacity, bound in zip(plan.capacities.tolist(), plan.clairvoyant_hit_tokens.tolist(), strict=True):
        tokens = capacity * plan.block_tokens
        lru = plan.lru_tokens_at(capacity)
        rates = (_rate(plan, lru), _rate(plan, bound), percent(lru / bound) if bound else "-")
        curve.add_row(f"{tokens:,}", _gib(tokens * bytes_per_token), *rates)
    columns = ["of achievable", "hit rate", "cache tokens", "cache GiB"]
    knees = new_table("how much memory LRU needs", *columns, *(["host GiB"] if device_tokens else []))
    for share in (*KNEES, 1.0):
        capacity = plan.knee(share)
        tokens = capacity * plan.block_tokens
        row = [
            f"{100 * share:.0f} %",
            _rate(plan, plan.lru_tokens_at(capacity)),
            f"{tokens:,}",
            _gib(tokens * bytes_per_token),
        ]
        if device_tokens:
            least = max(0, tokens - device_tokens)
            row.append("none" if not least else f"{_gib(least * bytes_per_token)} .. {_gib(tokens * bytes_per_token)}")
        knees.add_row(*row)
    if device_tokens:
        knees.caption = (
            f"host: beside a device of {device_tokens:,} tokens; the lower figure if no page is kept on both "
            "(write_back comes near it), the upper if all are (write_through)"
        )
        knees.caption_justify = "left"
    return [curve, knees]


def _rate(plan: Plan, hit_tokens: int) -> str:
    return percent(hit_tokens / plan.tokens if plan.tokens else None)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f}" if num_bytes >= GIB else f"{num_bytes / GIB:.3f}"


def print_all(tables: Sequence[RenderableType], stderr: bool = False) -> None:
    """Print tables to standard output (or error), one blank line between."""
    console = require("rich.console", "a table").Console(stderr=stderr)
    for table in tables:
        console.print(table)
        console.print()
