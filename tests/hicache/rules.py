"""Where radixkv's HiRadixCache does otherwise than the original, and why: the only differences a comparison allows.

Besides, ``OriginalSide.stamp_hits_only`` is applied in every comparison: see there. ``shown_by`` names a test in which
the original itself does what the rule says (test_against_original.py checks that it exists).
"""

from __future__ import annotations

import re
from typing import Any

from .side_by_side import Context, Difference, Rule
from .sides import LAYERS

ORIGINAL = "original/test_defects_original.py"
OTHER = "original/test_differences_original.py"


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


def _in_rounds(difference: Difference, context: Context) -> bool:
    """Some node with a host copy could be evicted but for a child that has none yet."""
    if context.setup.write_policy != "write_back":
        return False
    nodes = context.before["nodes"]
    ends = {name.partition("#")[2]: node for name, node in nodes.items()}
    waiting = (
        ends.get(node["above"]) for node in nodes.values() if node["device"] and not node["host"] and not node["locks"]
    )
    return any(above is not None and above["host"] and not above["locks"] for above in waiting)


FOREIGN = "keys are always chained from the root"
DUE = "what is due is stored at the next insertion through it"


def _foreign_keys(difference: Difference, context: Context) -> bool:
    return _field(difference, "own_keys") and difference.first is False and difference.second in (True, None)


def _after_foreign_keys(difference: Difference, context: Context) -> bool:
    return FOREIGN in context.used


def _stored_at_once(difference: Difference, context: Context) -> bool:
    node = _node(difference, context.second)
    threshold = 1 if context.setup.write_policy == "write_through" else 3
    return (
        (_field(difference, "stored") or _field(difference, "own_keys"))
        and node["stored"] and node["arrived"] and node["hits"] >= threshold
        and not _node(difference, context.first).get("stored", True)
    )  # fmt: skip


def _after_stored_at_once(difference: Difference, context: Context) -> bool:
    return DUE in context.used and context.step.name in ("prefetch", "progress")


def _pages_of_a_batch(difference: Difference, context: Context) -> bool:
    about = difference.where.startswith(("state.wrong_kv.", "state.wrong_rows.")) or difference.where == "seen.wrong_kv"
    return about and context.setup.storage and difference.second in ("absent", ())


def _miss_evicts(difference: Difference, context: Context) -> bool:
    """The original has evicted from the host for what storage may not have; radixkv has not."""
    if context.step.name != "prefetch":
        return False
    first, second = context.first["state"]["nodes"], context.second["state"]["nodes"]
    return first.keys() < second.keys()


def _prefetch_protects(difference: Difference, context: Context) -> bool:
    """A prefetch protects the node it continues; in the original also one without a host copy."""
    return _field(difference, "host_refs") and not _node(difference, context.second)["host"]


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
        shown_by=f"{OTHER}::test_write_back_counts_no_hits",
        explains=_no_hits,
    ),
    Rule(
        name="a load protects its path without locks",
        reason="Nodes that are loading protect their path by themselves; sizes are the same, lock_ref is the callers'.",
        shown_by=f"{OTHER}::test_load_locks_its_path",
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
        reason="The original starts at len(prefix_indices), which may lie inside of that page: the row then names "
        "slots that have been freed.",
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
    Rule(
        name=FOREIGN,
        reason="The original chains a node's keys from its parent's last acknowledged one, or from nothing.",
        shown_by=f"{ORIGINAL}::test_child_is_stored_under_the_keys_of_another_prefix",
        explains=_foreign_keys,
    ),
    Rule(
        name="storage without foreign keys",
        reason="Once the original has stored pages under keys that are not theirs, what storage answers differs.",
        shown_by=f"{ORIGINAL}::test_child_is_stored_under_the_keys_of_another_prefix",
        explains=_after_foreign_keys,
        stops=True,
    ),
    Rule(
        name=DUE,
        reason="A node with enough hits that was only recomputed (adopted) is not hit in either; the original lets it "
        "wait for a hit of its own, although it is on the path of this one.",
        shown_by=f"{OTHER}::test_adopted_node_is_not_stored",
        explains=_stored_at_once,
    ),
    Rule(
        name="storage that got a node earlier",
        reason="See the rule before: a prefetch below such a node can begin earlier.",
        shown_by=f"{OTHER}::test_adopted_node_is_not_stored",
        explains=_after_stored_at_once,
        stops=True,
    ),
    Rule(
        name="every page of a fetch has its own bytes",
        reason="The original reads all pages of a batch into one tensor: each gets the bytes of the last.",
        shown_by=f"{ORIGINAL}::test_pages_of_one_fetch_all_get_the_bytes_of_the_last",
        explains=_pages_of_a_batch,
    ),
    Rule(
        name="a prefetch protects what has a host copy",
        reason="protect_host keeps host pages; there are none to keep on a node without a copy.",
        shown_by=f"{OTHER}::test_prefetch_protects_a_node_without_host_copy",
        explains=_prefetch_protects,
    ),
    Rule(
        name="a prefetch evicts only for what storage has",
        reason="The original takes host pages, and evicts for them, before it asks storage.",
        shown_by=f"{ORIGINAL}::test_prefetch_of_what_is_not_stored_evicts_from_the_host",
        explains=_miss_evicts,
        stops=True,
    ),
    Rule(
        name="write_back frees what its backups held back only as far as it is needed",
        reason="A node with a host copy leaves in a second round, after its children have their copies, and that round "
        "frees what is then missing. The original frees it at once, while the children are on the device, and counts "
        "it in its place of the order; so it may free more.",
        shown_by=f"{OTHER}::test_write_back_frees_a_parent_while_its_child_is_copied",
        explains=_in_rounds,
        stops=True,
    ),
)
