"""Both implementations name the same facts when they refuse: the numbers and the nodes in their messages.

The words differ (one is Python, the other C), handles differ by tree. So a message is reduced to what it names: each
handle to the path of its node, and every other number as it is. The core must name all that the reference names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from radixkv.errors import RadixKVError
from radixkv.tree.reference import ReferenceTree
from tests.oracle.implementations import implementations
from tests.oracle.kit import Kit

PAGE = 4


def grown(cls: Any) -> Kit:
    """A tree with a node in every state."""
    kit = Kit(cls, PAGE)
    kit.insert("pend", [40, 41, 42, 43])
    kit.evict(1, backup=True)
    kit.match("pe")  # pe is split off the pending node
    kit.insert("abcd", [1, 2, 3, 4])
    kit.insert("abxy", [1, 2, 5, 6])
    kit.tree.set_host(kit.node("abcd"), [13, 14])
    kit.insert_host("hostly", [20, 21, 22, 23, 24, 25])
    kit.insert_host("host", [20, 21, 22, 23])
    kit.insert_host("load", [30, 31, 32, 33])
    kit.tree.set_device(kit.node("load"), [7, 8, 9, 10], loading=True)
    kit.match("lo")
    kit.insert("loadm", [7, 8, 9, 10, 11])
    kit.tree.lock(kit.node("abxy"))
    kit.tree.protect_host(kit.node("abcd"))
    return kit


MISUSES: dict[str, Callable[[Kit], Any]] = {
    "insert: wrong number of ids": lambda kit: kit.insert("zzz", [50, 51]),
    "insert: negative id": lambda kit: kit.insert("zzz", [50, -7, 51]),
    "insert: id twice": lambda kit: kit.insert("zzz", [50, 51, 50]),
    "insert: id owned": lambda kit: kit.insert("zzz", [50, 5, 51]),
    "insert: match too long": lambda kit: kit.insert("ab", [1, 2], match=kit.peek("abcd")),
    "insert: priority": lambda kit: kit.insert("z", [50], priority=1 << 40),
    "insert_host: wrong number of ids": lambda kit: kit.insert_host("zzz", [50, 51]),
    "insert_host: id owned": lambda kit: kit.insert_host("zzz", [50, 13, 51]),
    "match_extend: a peek's": lambda kit: kit.tree.match_extend(kit.peek("abc"), kit.key("x")),
    "lock: host-only": lambda kit: kit.tree.lock(kit.node("host")),
    "unlock: a lock below": lambda kit: kit.tree.unlock(kit.node("ab")),
    "unlock: host-only": lambda kit: kit.tree.unlock(kit.node("host")),
    "protect_host: no host copy": lambda kit: kit.tree.protect_host(kit.node("abxy")),
    "release_host: not protected": lambda kit: kit.tree.release_host(kit.node("host")),
    "pin: host-only": lambda kit: kit.tree.pin(kit.node("host"), 1),
    "evict: negative": lambda kit: kit.tree.evict(-3),
    "evict_host: negative": lambda kit: kit.tree.evict_host(-3),
    "finish_backup: not pending": lambda kit: kit.tree.finish_backup(kit.node("ab"), [50]),
    "finish_backup: split off": lambda kit: kit.tree.finish_backup(kit.node("pe"), [50, 51]),
    "finish_backup: wrong number": lambda kit: kit.tree.finish_backup(kit.node("pend"), [50, 51]),
    "finish_backup: id owned": lambda kit: kit.tree.finish_backup(kit.node("pend"), [50, 51, 52, 13]),
    "set_host: no boundary": lambda kit: kit.tree.set_host(kit.node("abxy"), [50]),
    "set_host: no ids": lambda kit: kit.tree.set_host(kit.node("abxy"), []),
    "set_host: too many": lambda kit: kit.tree.set_host(kit.node("abxy"), [50, 51, 52, 53, 54]),
    "set_host: there already": lambda kit: kit.tree.set_host(kit.node("abcd"), [50, 51]),
    "set_host: there already above": lambda kit: kit.tree.set_host(kit.node("loadm"), [50, 51, 52, 53, 54]),
    "set_host: host-only": lambda kit: kit.tree.set_host(kit.node("host"), [50, 51, 52, 53]),
    "set_host: pending": lambda kit: kit.tree.set_host(kit.node("pend"), [50, 51]),
    "set_host: id owned": lambda kit: kit.tree.set_host(kit.node("abxy"), [13, 50]),
    "set_device: there already": lambda kit: kit.tree.set_device(kit.node("ab"), [50, 51]),
    "set_device: parent host-only": lambda kit: kit.tree.set_device(kit.node("hostly"), [50, 51]),
    "set_device: wrong number": lambda kit: kit.tree.set_device(kit.node("host"), [50, 51, 52]),
    "finish_load: not loading": lambda kit: kit.tree.finish_load(kit.node("ab")),
    "finish_load: split off": lambda kit: kit.tree.finish_load(kit.node("lo")),
    "finish_load: in use": lambda kit: kit.tree.finish_load(kit.node("load"), success=False),
    "split_at: not a page": lambda kit: kit.tree.split_at(kit.node("abcd"), 3),
    "split_at: too far": lambda kit: kit.tree.split_at(kit.node("abcd"), 8),
    "delete: in use": lambda kit: kit.tree.delete(kit.node("ab")),
    "delete: one node": lambda kit: kit.tree.delete(kit.node("abxy")),
    "delete_namespace: in use": lambda kit: kit.tree.delete_namespace(),
    "mark: no boundary": lambda kit: kit.tree.mark(kit.node("abxy"), 1, 0, 3),
    "mark: too many": lambda kit: kit.tree.mark(kit.node("abxy"), 1, 0, 9),
    "mark: a bit in both": lambda kit: kit.tree.mark(kit.node("abxy"), 7, 12),
    "mark: no mask": lambda kit: kit.tree.mark(kit.node("abxy"), 300),
    "due: no tier": lambda kit: kit.tree.due(kit.node("abxy"), "disk", 1),
    "due: negative": lambda kit: kit.tree.due(kit.node("abxy"), "host", -2),
    "stale handle": lambda kit: kit.tree.lock(0x123),
    "take_events: negative": lambda kit: kit.tree.take_events(-1),
    "check: capacity": lambda kit: kit.tree.check_integrity(100, [90, 91]),
    "check: free and owned": lambda kit: kit.tree.check_integrity(100, [1]),
    "check: negative capacity": lambda kit: kit.tree.check_integrity(-4),
}


def facts(kit: Kit, misuse: Callable[[Kit], Any]) -> tuple[type, str, Counter[str]]:
    """(error, message, what it names)."""
    paths = {f"{node:#x}": path for node, path in kit.paths().items()}
    with pytest.raises(RadixKVError) as caught:
        misuse(kit)
    message = str(caught.value)
    named = re.findall(r"0x[0-9a-f]+|-?\d+", message.replace(f".. {2**63 - 1}", ""))  # no bound at all
    return caught.type, message, Counter(paths.get(word, word) for word in named)


@pytest.mark.parametrize("what", MISUSES)
def test_the_core_names_what_the_reference_names(what: str) -> None:
    if "core" not in implementations():
        pytest.skip("radixkv.tree.core is not built")
    wanted, by_reference, wanted_facts = facts(grown(ReferenceTree), MISUSES[what])
    found, by_core, found_facts = facts(grown(implementations()["core"]), MISUSES[what])
    assert found is wanted
    missing = wanted_facts - found_facts
    assert not missing, f"{dict(missing)} of {by_reference!r} not in {by_core!r}"
