"""L6: the demo's report for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..replay.present import new_table, percent

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["demo_tables", "request_line"]

_COLOURS = {"ok": "green", "FAILED": "bold red", "not shown": "yellow"}
_TIERS = ("device", "host", "storage", "computed")
_ASKED = {
    "nothing": "nothing cached", "device": "device", "host": "device and host", "storage": "device, host and storage",
}  # fmt: skip


def demo_tables(report: dict[str, Any]) -> list[RenderableType]:
    """Tokens by tier, time to first token, and the checks."""
    return [_tokens_table(report), _first_token_table(report), _checks_table(report)]


def request_line(line: dict[str, Any]) -> str:
    """One request or control as it is judged, for a progress display."""
    tokens = ", ".join(f"{line['tokens'][f'{tier}_tokens']:,} {tier}" for tier in _TIERS)
    who = f"{line['user']}, turn {line['turn']}" if "user" in line else f"control: {line['control']}"
    return f"{who}: {line['prompt_tokens']:,} tokens ({tokens})"


def _tokens_table(report: dict[str, Any]) -> Table:
    config, tokens = report["config"], report["tokens"]
    title = f"{report['model']} on {report['device']}: prompt tokens by where their KV came from"
    table = new_table(title, "tier", "capacity tokens", "before the restart", "after it", "of all")
    total = {phase: sum(counts.values()) for phase, counts in tokens.items()}
    for tier in _TIERS:
        if tier == "computed":
            table.add_section()
        capacity = (
            f"{config[f'{tier}_tokens']:,}" if f"{tier}_tokens" in config else "no limit" if tier == "storage" else ""
        )
        both = tokens["before"][tier] + tokens["after"][tier]
        share = percent(both / sum(total.values()))
        table.add_row(tier, capacity, f"{tokens['before'][tier]:,}", f"{tokens['after'][tier]:,}", share)
    table.caption = (
        f"{report['token_bytes']:,} bytes a token; the second process had the storage folder and nothing else"
    )
    table.caption_justify = "left"
    return table


def _first_token_table(report: dict[str, Any]) -> Table:
    table = new_table("time to first token, median", "prefix from", "requests", "with", "without", "times faster")
    for tier, figures in report["first_token_s"].items():
        with_ms, without_ms = figures["cached"] * 1e3, figures["recomputed"] * 1e3
        ratio = f"{without_ms / with_ms:.1f}" if tier != "nothing" else ""
        table.add_row(_ASKED[tier], str(figures["requests"]), f"{with_ms:,.0f} ms", f"{without_ms:,.0f} ms", ratio)
    return table


def _checks_table(report: dict[str, Any]) -> Table:
    table = new_table("checks", "", "claim", "figures")
    table.columns[1].justify = table.columns[2].justify = "left"
    for check in report["checks"]:
        verdict = check["verdict"]
        table.add_row(f"[{_COLOURS[verdict]}]{verdict}[/]", check["name"], check["detail"])
    table.caption = f"{report['wall_s']:.0f} s in all"
    table.caption_justify = "left"
    return table
