"""L5: the picture of a plan. matplotlib is optional (the extra ``cli``) and imported on use."""

from __future__ import annotations

from typing import Any

from .plan import Plan
from .present import GIB, KNEES, require

__all__ = ["plan_png"]

_INK, _GRID, _BLUE, _ORANGE = "#2b2b2b", "#e3e3e3", "#1f6fb4", "#d9730d"
_HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9}


def plan_png(plan: Plan, path: str, title: str, bytes_per_token: int, device_tokens: int = 0) -> None:
    """Draw hit rate against capacity: LRU at every size, the bound, and the sizes that reach a share of the achievable.

    Raises: MissingExtraError without matplotlib; OSError if the file cannot be written.
    """
    require("matplotlib", "a PNG").use("Agg")
    pyplot = require("matplotlib.pyplot", "a PNG")
    figure, axes = pyplot.subplots(figsize=(9.6, 5.4), dpi=150)
    gib_per_block = plan.block_tokens * bytes_per_token / GIB
    low = max(int(plan.capacities[0]), 1)
    high = max(int(plan.capacities[-1]), len(plan.lru_hit_tokens) - 1, low + 1)
    axes.set_xscale("log")
    axes.set_xlim(low * gib_per_block, high * gib_per_block * 1.25)
    _draw_curves(axes, plan, gib_per_block, range(low, high + 1))
    _mark_knees(axes, plan, gib_per_block, low)
    if device_tokens:
        _draw_device(axes, device_tokens * bytes_per_token / GIB)
    _dress(axes, plan, title, bytes_per_token, gib_per_block)
    figure.tight_layout()
    try:
        figure.savefig(path, format="png")
    finally:
        pyplot.close(figure)


def _percent(plan: Plan, hit_tokens: int) -> float:
    return 100 * hit_tokens / max(plan.tokens, 1)


def _draw_curves(axes: Any, plan: Plan, gib_per_block: float, sizes: range) -> None:
    achievable = _percent(plan, plan.achievable_hit_tokens)
    axes.axhline(achievable, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(f"unbounded cache: {achievable:.1f} %", (0.012, achievable), xycoords=axes.get_yaxis_transform(),
                  xytext=(0, 3), textcoords="offset points", color=_INK, fontsize=9, bbox=_HALO)  # fmt: skip
    bound = [_percent(plan, hits) for hits in plan.clairvoyant_hit_tokens.tolist()]
    axes.plot([size * gib_per_block for size in plan.capacities.tolist()], bound, color=_ORANGE, marker="o",
              markersize=4.5, linewidth=1.6, label="clairvoyant bound (farthest next use, with bypass)")  # fmt: skip
    lru = [_percent(plan, plan.lru_tokens_at(size)) for size in sizes]
    axes.plot([size * gib_per_block for size in sizes], lru, color=_BLUE, linewidth=2.4, label="LRU, every size")
    axes.set_ylim(0, max(achievable * 1.16, 1.0))


def _mark_knees(axes: Any, plan: Plan, gib_per_block: float, low: int) -> None:
    """A dot where LRU reaches each share of the achievable, with its size beside it."""
    for share in KNEES:
        size = plan.knee(share)
        if size < low or not plan.achievable_hit_tokens:
            continue
        x, y = size * gib_per_block, _percent(plan, plan.lru_tokens_at(size))
        axes.plot([x], [y], marker="o", markersize=6, color="white", markeredgecolor=_BLUE, markeredgewidth=1.8,
                  zorder=5)  # fmt: skip
        axes.annotate(f"{100 * share:.0f} %: {_gib(x)}", (x, y), xytext=(8, -12), textcoords="offset points",
                      fontsize=8.5, color=_INK)  # fmt: skip


def _draw_device(axes: Any, device_gib: float) -> None:
    axes.axvline(device_gib, color=_INK, linewidth=0.9, linestyle=":")
    low, high = axes.get_xlim()
    if low <= device_gib <= high:
        axes.text(device_gib, 0.03, " device alone", transform=axes.get_xaxis_transform(), color=_INK, fontsize=9)


def _dress(axes: Any, plan: Plan, title: str, bytes_per_token: int, gib_per_block: float) -> None:
    """Axes, ticks at 1-2-5, titles, legend."""
    ticker = require("matplotlib.ticker", "a PNG")
    tokens = axes.secondary_xaxis(
        "top", functions=(lambda gib: gib * GIB / bytes_per_token, lambda count: count * bytes_per_token / GIB)
    )
    for axis, text in ((axes.xaxis, lambda value, _: f"{value:,.10g}"), (tokens.xaxis, lambda value, _: _short(value))):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(text))
        axis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(f"cache capacity, GiB at {bytes_per_token:,} bytes of KV a token")
    tokens.set_xlabel("cache capacity, tokens", color=_INK, fontsize=9)
    tokens.tick_params(colors=_INK, labelsize=8.5)
    axes.set_ylabel("prompt tokens hit, %")
    subtitle = f"{plan.requests:,} requests, {_short(float(f'{plan.tokens:.3g}'))} prompt tokens"
    axes.set_title(f"{title}: {subtitle}", loc="left", color=_INK, fontsize=11.5, fontweight="bold", pad=10)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def _gib(value: float) -> str:
    return f"{value:,.0f} GiB" if value >= 10 else f"{value:.2g} GiB"


def _short(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.10g}{unit}"
    return f"{value:,.10g}"
