"""Trees for people: the order of dump(), and Graphviz."""

from __future__ import annotations

from collections.abc import Iterable

from ..types import ROOT, NodeInfo

__all__ = ["in_dump_order", "render_dot"]

SHOWN_TOKENS = 4


def in_dump_order(nodes: Iterable[NodeInfo]) -> list[NodeInfo]:
    """Parents first, siblings ordered by their tokens (as tuples), namespaces by their encoding."""
    children: dict[object, list[NodeInfo]] = {}
    for info in nodes:
        children.setdefault(info.parent if info.parent != ROOT else info.namespace, []).append(info)
    ordered: list[NodeInfo] = []
    waiting: list[NodeInfo] = []
    for namespace in sorted((key for key in children if isinstance(key, bytes)), reverse=True):
        waiting += _last_first(children[namespace])
    while waiting:
        info = waiting.pop()
        ordered.append(info)
        waiting += _last_first(children.get(info.node, []))
    return ordered


def _last_first(siblings: list[NodeInfo]) -> list[NodeInfo]:
    return sorted(siblings, key=lambda info: tuple(info.tokens.tolist()), reverse=True)


def render_dot(nodes: Iterable[NodeInfo]) -> str:
    """A Graphviz digraph of nodes in dump order: one box a node; dashed on the host only, bold when locked."""
    lines = ["digraph radix_tree {", '  node [shape=box, fontname="monospace"];']
    roots: dict[bytes, str] = {}
    for info in nodes:
        if info.parent == ROOT and info.namespace not in roots:
            roots[info.namespace] = f"root{len(roots)}"
            label = "root" if info.namespace == b"" else f"root {info.namespace.hex()}"
            lines.append(f'  {roots[info.namespace]} [label="{label}", shape=ellipse];')
        style = "dashed" if info.page_ids is None else "bold" if info.lock_ref else "solid"
        lines.append(f'  n{info.node} [label="{_label(info)}", style={style}];')
        parent = roots[info.namespace] if info.parent == ROOT else f"n{info.parent}"
        lines.append(f"  {parent} -> n{info.node};")
    return "\n".join([*lines, "}"]) + "\n"


def _label(info: NodeInfo) -> str:
    tokens = ",".join(map(str, info.tokens[:SHOWN_TOKENS].tolist())) + (",…" if len(info.tokens) > SHOWN_TOKENS else "")
    tiers = "+".join(name for name, ids in (("device", info.page_ids), ("host", info.host_page_ids)) if ids is not None)
    flags = "".join(
        f" {name}"
        for name, shown in (
            ("loading", info.loading),
            ("pending", info.backup_pending),
            ("pinned", info.pinned_until_ns is not None),
        )
        if shown
    )
    counts = f"lock {info.lock_ref} host_ref {info.host_ref} hits {info.hit_count}"
    if info.marks:
        counts += f" marks {info.marks:#04x}"
    return f"[{tokens}] {len(info.tokens)} tokens\\n{tiers} {counts}{flags}"
