"""Where radixkv's HiRadixCache does otherwise than the original, and why: the only differences a comparison allows.

Besides, ``OriginalSide.stamp_hits_only`` is applied in every comparison: see there. ``shown_by`` names a test in which
the original itself does what the rule says (test_rules.py checks that it exists).
"""

from __future__ import annotations

import re
from typing import Any

from .side_by_side import Context, Difference, Rule
from .sides import LAYERS

ORIGINAL = "original/test_defects_original.py"
OURS = "test_rules.py"


def _field(difference: Difference, name: str) -> bool:
    return re.fullmatch(rf"state\.nodes\..*\.{name}", difference.where) is not None


def _node(difference: Difference, state: dict[str, Any]) -> dict[str, Any]:
    """The node that a difference is about, in one side's view."""
    name = re.sub(r"^state\.nodes\.(.*?)(\.[a-z_]+)?$", r"\1", difference.where)
    node: dict[str, Any] = state.get("state", {}).get("nodes", {}).get(name, {})
    return node


def _arrives_later(difference: Difference, context: Context) -> bool:
    if not _field(difference, "arrived") or context.step.name in ("poll", "reset") or context.setup.storage:
        return False
    node = _node(difference, context.second)
    return difference.first is True and difference.second is False and node["host"] and node["locks"] > 0


def _no_hits(difference: Difference, context: Context) -> bool:
    return _field(difference, "hits") and context.setup.write_policy == "write_back" and difference.first == 0


def _load_without_locks(difference: Difference, context: Context) -> bool:
    if not _field(difference, "locks"):
        return False
    loading = sum(node["loading"] for node in context.second["state"]["nodes"].values())
    return 0 < difference.first - difference.second <= loading


def _load_protects_host(difference: Difference, context: Context) -> bool:
    return (
        _field(difference, "host_refs")
        and _node(difference, context.second)["loading"]
        and difference.second == difference.first + 1
    )


def _stale_row(difference: Difference, context: Context) -> bool:
    """Only in chunked prefills that stop inside of a page."""
    return context.setup.page_size > 1 and (
        difference.where.startswith("state.wrong_rows.") and difference.second == "absent"
    )


def _page_first(difference: Difference, context: Context) -> bool:
    about = difference.where.startswith(("state.wrong_kv.", "state.wrong_rows.")) or difference.where == "seen.wrong_kv"
    if not about or context.setup.layout != "page_first" or difference.second not in ("absent", ()):
        return False
    return bool(difference.first) and all(plane % LAYERS for plane in difference.first)


def _lost_children(difference: Difference, context: Context) -> bool:
    return bool(context.first.get("state", {}).get("host_lost"))


def _full_host(difference: Difference, context: Context) -> bool:
    return context.setup.write_policy == "write_back" and context.first.get("raised", "").startswith("AssertionError")


RULES = (
    Rule(
        name="backuped once the copy has arrived",
        reason="A copy that is still under way, or failed, is none: it must not be loaded, stored or counted.",
        shown_by=f"{ORIGINAL}::test_failed_copy_leaves_a_copy_that_never_was",
        explains=_arrives_later,
    ),
    Rule(
        name="hits are counted under write_back too",
        reason="hit_count is of the tree, which lfu and slru evict by; no write policy changes it.",
        shown_by=f"{OURS}::test_write_back_counts_no_hits",
        explains=_no_hits,
    ),
    Rule(
        name="a load protects its path without locks",
        reason="Nodes that are loading protect their path by themselves; sizes are the same, lock_ref is the callers'.",
        shown_by=f"{OURS}::test_load_locks_its_path",
        explains=_load_without_locks,
    ),
    Rule(
        name="a load protects its host pages",
        reason="What is being read must not be evicted before its ack, whatever happens to the device copy.",
        shown_by=f"{ORIGINAL}::test_load_back_evicts_the_host_pages_that_it_loads",
        explains=_load_protects_host,
    ),
    Rule(
        name="a request's row is renewed from the first page that differs",
        reason="The original starts at len(prefix_indices), which may lie inside of that page: the row then names slots "
        "that have been freed.",
        shown_by=f"{ORIGINAL}::test_row_keeps_slots_of_a_page_that_was_freed",
        explains=_stale_row,
    ),
    Rule(
        name="page_first loads every layer",
        reason="The original's call names no layer, so each gets the KV of layer 0.",
        shown_by=f"{ORIGINAL}::test_page_first_loads_lose_the_layer",
        explains=_page_first,
    ),
    Rule(
        name="host slots of the children of an evicted node are freed",
        reason="The original drops a node without a host copy together with its host-only children, and their slots.",
        shown_by=f"{ORIGINAL}::test_evicting_an_unbacked_node_loses_its_host_only_children",
        explains=_lost_children,
        stops=True,
    ),
    Rule(
        name="write_back drops what finds no room on the host",
        reason="The original asserts.",
        shown_by=f"{ORIGINAL}::test_write_back_with_a_full_host_asserts",
        explains=_full_host,
        stops=True,
    ),
)
