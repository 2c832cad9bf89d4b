"""Drives two trees side by side through every operation and compares all that they say.

The driver plays the engine around a tree: it owns both pools of page ids, hands ids out and takes back what leaves,
keeps locks, pins, backups, loads and write-throughs in flight, and remembers old handles and old matches to try again.
Each operation draws its choices from a ``Choices``, so that hypothesis (test_side_by_side.py) and a seeded generator
(fuzz.py) share this one driver. Every operation has a method named op_*.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from radixkv.errors import RadixKVError
from radixkv.types import ROOT
from tests.oracle.kit import plain, plain_event

Pair = tuple[int, int]  # one node's handle in either tree

NAMESPACES: list[dict[str, Any]] = [{}, {"extra_key": "x"}, {"extra_key": "", "cache_salt": 5}]


class Choices(Protocol):
    def below(self, n: int) -> int:
        """An int in 0 .. n - 1; 0 is the simplest."""


class Difference(AssertionError):
    """The two trees disagree, or a tree broke a law."""


def require(condition: bool, what: str, *values: Any) -> None:
    if not condition:
        raise Difference(f"{what}: " + " | ".join(map(repr, values)))


class Pool:
    """Page ids of one tier that are not in the trees."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = list(range(capacity))

    def take(self, count: int, c: Choices) -> list[int] | None:
        """``count`` ids, or None if there are not enough."""
        if count > len(self.free):
            return None
        taken = []
        for _ in range(count):
            at = c.below(len(self.free))
            self.free[at], self.free[-1] = self.free[-1], self.free[at]
            taken.append(self.free.pop())
        return taken

    def put(self, ids: Sequence[int]) -> None:
        self.free.extend(ids)


class Mirror:
    """What a consumer of the events believes; breaks if they come in an impossible order."""

    def __init__(self) -> None:
        self.parents: dict[str, dict[int, int | None]] = {"device": {}, "host": {}}
        self.children: dict[str, Counter[int | None]] = {"device": Counter(), "host": Counter()}

    def hear(self, event: tuple[Any, ...]) -> None:
        kind, key, parent, _, medium = event
        device, host = self.parents["device"], self.parents["host"]
        if kind == "cleared":
            self.__init__()
            return
        mine, children = self.parents[medium], self.children[medium]
        if kind == "stored":
            require(key not in mine, "stored twice", event)
            above = parent is None or parent in device or (medium == "host" and parent in host)
            require(above, "stored before its parent", event)
            mine[key] = parent
            children[parent] += 1
        else:
            require(mine.pop(key, -1) == parent, "removed, but never stored there", event)
            children[parent] -= 1
            if not children[parent]:
                del children[parent]
            require(not self.children["device"][key] or (medium == "host" and key in device),
                    "removed before a child on the device", event)
            if medium == "host" and key not in device:
                require(not self.children["host"][key], "left the tree before a child on the host", event)


    def read(self, tree: Any) -> None:
        """After a gap: believe what the tree's dump says."""
        self.__init__()
        last: dict[int, int | None] = {ROOT: None}
        for info in tree.dump():
            key = last[info.parent]
            for page in tree.page_keys(info.node).tolist():
                for medium, ids in (("device", info.page_ids), ("host", info.host_page_ids)):
                    if ids is not None:
                        self.parents[medium][page] = key
                        self.children[medium][key] += 1
                key = page
            last[info.node] = key


class Driver:
    """Two trees, the pools around them, and everything that is under way."""

    def __init__(
        self, ours: Any, theirs: Any, page_size: int, policy: str, *, events: bool, pages: int = 120,
        host_pages: int = 160, letters: int = 3, longest: int = 9, max_events: int = 1 << 20,
    ) -> None:  # fmt: skip
        self.a = ours(page_size, policy, events=events, max_events=max_events)
        self.b = theirs(page_size, policy, events=events, max_events=max_events)
        self.max_events = max_events
        self.dropped_events = 0
        self.page_size = page_size
        self.events = events
        self.device, self.host = Pool(pages), Pool(host_pages)
        self.letters, self.longest = letters, longest
        # Pages of two letters differ in one token only, at a place that depends on the letters.
        self.page_of = np.zeros((letters, page_size), dtype=np.int32)
        for letter in range(letters):
            self.page_of[letter, (letter * 5) % page_size] = letter + 1
        self.to_b: dict[int, int] = {ROOT: ROOT}
        self.to_a: dict[int, int] = {ROOT: ROOT}
        self.live: list[Pair] = []
        self.recent: deque[Pair] = deque(maxlen=24)  # alive or not
        self.matches: deque[tuple[Any, Any, int]] = deque(maxlen=12)  # and the number of their namespace
        self.keys: deque[tuple[int, ...]] = deque(maxlen=24)
        self.now = 0
        self.mirrors = (Mirror(), Mirror())
        self.log: deque[Any] = deque(maxlen=40)
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._nothing_under_way()

    def _nothing_under_way(self) -> None:
        self.locks: list[Pair] = []
        self.host_locks: list[Pair] = []
        self.backups: dict[Pair, int] = {}  # and their pages, oldest first
        self.loads: list[Pair] = []
        self.writes: list[tuple[Pair, list[int], int | None]] = []  # with host ids; marks: of begin_write

    def told(self) -> list[str]:
        """The last calls, for people: keys as letters, one a page."""

        def brief(value: Any) -> str:
            return repr(value.tolist() if isinstance(value, np.ndarray) else value)

        def letters(tokens: Any) -> str:
            whole, tail = divmod(len(tokens), self.page_size)
            pages = np.array(tokens, dtype=np.int32)[: len(tokens) - tail].reshape(whole, self.page_size)
            key = "".join(chr(ord("a") + page.max() - 1) for page in pages)
            return f"key {key!r}" + (f" + {tail} tokens" if tail else "")

        with_key = ("match", "peek", "insert", "insert_host")
        lines = []
        for name, node, args, more, match in self.log:
            parts = [] if node is None else [f"{node[0]:#x} {node[1]:#x}"]
            if name in with_key:
                parts.append(letters(args[0]))
                args = args[1:]
            elif name == "peek_many":
                parts += map(letters, args[0])
                args = ()
            parts += map(brief, args)
            parts += [letters(value) if key == "tokens" else f"{key}={value!r}" for key, value in more.items()]
            parts += [] if match is None else [f"match={match[0]!r}"]
            lines.append(f"{name}({', '.join(parts)})")
        return lines

    # ---- calling both and comparing ----------------------------------------------------------------------------------

    def call(
        self, name: str, *args: Any, node: Pair | None = None, match: tuple[Any, Any] | None = None, exact: bool = True,
        **more: Any,
    ) -> tuple[Any, Any] | None:  # fmt: skip
        """Call one method of both trees. Returns both results, or None if both raised the same error.

        Args:
            node: the first argument, by tree.
            match: the argument of that name, by tree.
            exact: False if the arguments may be wrong in two ways at once; then any error of ours will do.
        """
        self.counts[name] += 1
        self.log.append((name, node, args, more, match))
        results, raised = [], []
        for at, tree in enumerate((self.a, self.b)):
            extra = more if match is None else {**more, "match": match[at]}
            try:
                results.append(getattr(tree, name)(*(() if node is None else (node[at],)), *args, **extra))
                raised.append(None)
            except RadixKVError as error:
                raised.append(type(error))
        agree = raised[0] is raised[1] or (not exact and None not in raised)
        require(agree, f"{name} raised", *raised)
        if raised[0] is not None:
            self.errors[f"{name} {raised[0].__name__}"] += 1
            return None
        return results[0], results[1]

    def same(self, what: str, a: Any, b: Any) -> Any:
        require(a == b, what, a, b)
        return a

    def same_node(self, a: int, b: int) -> Pair:
        """A node that both trees have just named: known by both, or new to both."""
        require(self.to_b.setdefault(a, b) == b and self.to_a.setdefault(b, a) == a, "handles", a, b)
        if a != ROOT:
            self.recent.append((a, b))
        return a, b

    def same_ids(self, what: str, a: Any, b: Any, ordered: bool = True) -> list[int]:
        require(a.dtype == b.dtype == np.int32, f"dtype of {what}", a.dtype, b.dtype)
        ours, theirs = a.tolist(), b.tolist()
        require((ours == theirs) if ordered else (sorted(ours) == sorted(theirs)), what, ours, theirs)
        return ours

    def same_match(self, pair: tuple[Any, Any] | None, namespace: int) -> tuple[Any, Any] | None:
        if pair is None:
            return None
        a, b = pair
        self.same("num_tokens", a.num_tokens, b.num_tokens)
        self.same("host_num_tokens", a.host_num_tokens, b.host_num_tokens)
        self.same("loading_tokens", a.loading_tokens, b.loading_tokens)
        ids = self.same_ids("page_ids", a.page_ids(), b.page_ids())
        host_ids = self.same_ids("host_page_ids", a.host_page_ids(), b.host_page_ids())
        require(len(ids) * self.page_size == a.num_tokens, "ids of the match", ids, a.num_tokens)
        require(len(host_ids) * self.page_size == a.host_num_tokens, "host ids", host_ids, a.host_num_tokens)
        self.same_node(a.device_node, b.device_node)
        self.same_node(a.host_node, b.host_node)
        self.matches.append((a, b, namespace))
        return a, b

    def same_departures(self, pair: tuple[Any, Any] | None, ordered: bool, host_ordered: bool = False) -> Any:
        """Compare two EvictResults and take the pages back."""
        if pair is None:
            return None
        a, b = pair
        self.same("freed tokens", a.num_tokens, b.num_tokens)
        self.device.put(self.same_ids("freed pages", a.page_ids, b.page_ids, ordered))
        self.host.put(self.same_ids("freed host pages", a.host_page_ids, b.host_page_ids, host_ordered))
        self.same("length of to_backup", len(a.to_backup), len(b.to_backup))
        for mine, other in zip(a.to_backup, b.to_backup, strict=True):
            pages = self.same_ids("pages to back up", mine.page_ids, other.page_ids)
            self.backups[self.same_node(mine.node, other.node)] = len(pages)
        return a

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def pick(self, c: Choices, items: Sequence[Any]) -> Any:
        return items[c.below(len(items))] if items else None

    def some_key(self, c: Choices) -> tuple[int, ...]:
        """New letters, or an earlier key: as it was, cut, extended, or with one letter changed."""
        how = c.below(6) if self.keys else 0
        if how == 0:
            key = tuple(c.below(self.letters) for _ in range(c.below(self.longest + 1)))
        else:
            key = self.keys[c.below(len(self.keys))]
            at = c.below(len(key) + 1)
            if how == 2:
                key = key[:at]
            elif how >= 4:
                key = key[: at if how == 4 else len(key)] + tuple(c.below(self.letters) for _ in range(1 + c.below(3)))
        self.keys.append(key[: self.longest])
        return key[: self.longest]

    def tokens(self, key: tuple[int, ...], c: Choices) -> Any:
        """The tokens of a key, sometimes with a tail that must be ignored, as an array or a list."""
        tail = c.below(self.page_size) if c.below(4) == 0 else 0
        tokens = np.concatenate([self.page_of[list(key)].reshape(-1), np.full(tail, 1, np.int32)])
        return tokens.tolist() if c.below(8) == 1 else tokens

    def some_node(self, c: Choices) -> Pair | None:
        """Most often a live node, sometimes one that left, rarely ROOT."""
        how = c.below(16)
        if how == 15:
            return ROOT, ROOT
        if how >= 11 or not self.live:
            return self.pick(c, self.recent)
        return self.pick(c, self.live)

    def node_of(self, key: tuple[int, ...], namespace: int) -> tuple[Any, Any] | None:
        """Peek, without remembering the result."""
        tokens = self.page_of[list(key)].reshape(-1)
        return self.call("peek", tokens, **NAMESPACES[namespace])

    # ---- operations: look-up -----------------------------------------------------------------------------------------

    def op_match(self, c: Choices) -> None:
        namespace = c.below(len(NAMESPACES))
        tokens = self.tokens(self.some_key(c), c)
        self.same_match(self.call("match", tokens, **NAMESPACES[namespace]), namespace)

    def op_peek(self, c: Choices) -> None:
        namespace = c.below(len(NAMESPACES))
        tokens = self.tokens(self.some_key(c), c)
        self.same_match(self.call("peek", tokens, **NAMESPACES[namespace]), namespace)

    def op_peek_many(self, c: Choices) -> None:
        namespace = c.below(len(NAMESPACES))
        keys = [self.tokens(self.some_key(c), c) for _ in range(c.below(4))]
        a, b = self.call("peek_many", keys, **NAMESPACES[namespace])
        self.same("hits", a.tolist(), b.tolist())
        self.same("shape of hits", a.shape, (len(keys), 2))

    def op_match_extend(self, c: Choices) -> None:
        old = self.pick(c, self.matches)
        if old is None:
            return
        more = tuple(c.below(self.letters) for _ in range(c.below(4)))
        self.same_match(self.call("match_extend", tokens=self.tokens(more, c), match=old[:2]), old[2])

    # ---- operations: growth ------------------------------------------------------------------------------------------

    def op_insert(self, c: Choices) -> None:
        self._insert(c, "insert", self.device)

    def op_insert_host(self, c: Choices) -> None:
        self._insert(c, "insert_host", self.host)

    def _insert(self, c: Choices, name: str, pool: Pool) -> Pair | None:
        """Insert a key; returns the node of the result."""
        namespace = c.below(len(NAMESPACES))
        key = self.some_key(c)
        fresh = self._allocate(pool, len(key), c)
        if fresh is None:
            return None
        ids = list(fresh)
        hit = self.node_of(key, namespace)[0]
        known = hit.page_ids().tolist() if name == "insert" else []
        how = c.below(8)
        if how < 4:  # an engine that matched first passes the tree's own ids for the prefix
            ids[: len(known)] = known
        elif how == 4:  # or some of them
            ids = [mine if at >= len(known) or c.below(2) else known[at] for at, mine in enumerate(ids)]
        elif how == 5 and ids and c.below(3) == 0:  # a broken caller: an id that is owned elsewhere, or one twice
            other = self.node_of(self.some_key(c), c.below(len(NAMESPACES)))[0]
            stolen = (other.page_ids() if name == "insert" else other.host_page_ids()).tolist() + ids
            ids[c.below(len(ids))] = stolen[c.below(len(stolen))]
        hint = None
        if how != 5 and c.below(2):
            old = self.pick(c, self.matches)
            if old is not None and c.below(3) == 0:
                hint = old[:2]  # any namespace, any age
            else:
                hint = self.call("match", self.page_of[list(key)].reshape(-1), **NAMESPACES[namespace])
                self.same_match(hint, namespace)
        priority = c.below(5) - 1 if c.below(3) == 0 else 0
        passed = ids if c.below(4) == 1 else np.array(ids, dtype=np.int32)
        pair = self.call(name, self.tokens(key, c), passed, match=hint, priority=priority, **NAMESPACES[namespace])
        if pair is None:
            pool.put(fresh)
            return None
        a, b = pair
        self.same("prefix_tokens", a.prefix_tokens, b.prefix_tokens)
        field = "duplicate_page_ids" if name == "insert" else "duplicate_host_page_ids"
        duplicates = self.same_ids(field, getattr(a, field), getattr(b, field))
        if name == "insert":
            self.same_ids("adopted_host_page_ids", a.adopted_host_page_ids, b.adopted_host_page_ids)
        kept = set(ids) - set(duplicates)  # the tree owns these now, before the call it did not own the fresh ones
        pool.put([page for page in fresh if page not in kept])
        return self.same_node(a.node, b.node)

    def _allocate(self, pool: Pool, count: int, c: Choices) -> list[int] | None:
        """As an engine does: if ids run out, evict and try again."""
        ids = pool.take(count, c)
        if ids is None and pool is self.device:
            out = self.call("evict", (count - len(pool.free)) * self.page_size)
            self.same_departures(out, ordered=True)
        elif ids is None:
            out = self.call("evict_host", (count - len(pool.free)) * self.page_size)
            self.same_departures(out, ordered=True, host_ordered=True)
        return ids if ids is not None else pool.take(count, c)

    # ---- operations: protection --------------------------------------------------------------------------------------

    def op_lock(self, c: Choices) -> None:
        node = self.some_node(c)
        if node is None:
            return
        pair = self.call("lock", node=node)
        if pair is not None:
            require(self.same("change of evictable tokens", *pair) <= 0, "lock released tokens", pair)
            if node[0] != ROOT:
                self.locks.append(node)

    def op_unlock(self, c: Choices) -> None:
        """Most often a lock that we hold; else whatever: it may only work if we hold that one."""
        node = self.pick(c, self.locks) if c.below(6) else self.some_node(c)
        if node is None:
            return
        pair = self.call("unlock", node=node)
        if pair is not None:
            require(self.same("change of evictable tokens", *pair) >= 0, "unlock protected tokens", pair)
            if node[0] != ROOT:
                require(node in self.locks, "unlock of a node that was not locked", node)
                self.locks.remove(node)

    def op_unlock_above(self, c: Choices) -> None:
        """A caller who mistakes the parent of what it locked for the node itself."""
        node = self.pick(c, self.locks)
        if node is not None:
            parent = self.same_node(*(info.parent for info in self.call("node_info", node=node)))
            if self.call("unlock", node=parent) is not None and parent[0] != ROOT:
                require(parent in self.locks, "unlock of a node that was not locked", parent)
                self.locks.remove(parent)

    def op_prefetch(self, c: Choices) -> None:
        """Storage brought more of a prefix to the host, and a request waits for it: insert_host and protect_host."""
        node = self._insert(c, "insert_host", self.host)
        if node is not None and self.call("protect_host", node=node) is not None and node[0] != ROOT:
            self.host_locks.append(node)

    def op_protect_host(self, c: Choices) -> None:
        node = self.some_node(c)
        if node is not None and self.call("protect_host", node=node) is not None and node[0] != ROOT:
            self.host_locks.append(node)

    def op_release_host(self, c: Choices) -> None:
        node = self.pick(c, self.host_locks) if c.below(6) else self.some_node(c)
        if node is not None and self.call("release_host", node=node) is not None and node[0] != ROOT:
            self.host_locks.remove(node)

    def op_pin(self, c: Choices) -> None:
        node = self.some_node(c)
        if node is not None:
            pair = self.call("pin", self.now + c.below(8), node=node)
            self.same("change of evictable tokens", *(pair or (0, 0)))

    def op_unpin(self, c: Choices) -> None:
        node = self.some_node(c)
        if node is not None:
            pair = self.call("unpin", node=node)
            self.same("change of evictable tokens", *(pair or (0, 0)))

    def op_expire(self, c: Choices) -> None:
        self.now += c.below(4)
        self.same("pins removed", *self.call("expire", self.now))

    # ---- operations: the tiers ---------------------------------------------------------------------------------------

    def op_evict(self, c: Choices) -> None:
        self.same_departures(self.call("evict", c.below(8 * self.page_size)), ordered=True)

    def op_evict_backup(self, c: Choices) -> None:
        self.same_departures(self.call("evict", c.below(8 * self.page_size), True), ordered=True)

    def op_evict_host(self, c: Choices) -> None:
        out = self.call("evict_host", c.below(8 * self.page_size))
        self.same_departures(out, ordered=True, host_ordered=True)

    def op_evict_everything(self, c: Choices) -> None:
        """On the host this frees exactly what the counter says."""
        if c.below(4) == 0:
            self.same_departures(self.call("evict", 1 << 40, bool(c.below(2))), ordered=True)
        elif c.below(4) == 0:
            could = [tree.stats().host_evictable_tokens for tree in (self.a, self.b)]
            out = self.call("evict_host", 1 << 40)
            self.same("tokens that evict_host could free", could, [result.num_tokens for result in out])
            self.same_departures(out, ordered=True, host_ordered=True)
            self.same("host tokens left to free", self.a.stats().host_evictable_tokens, 0)

    def op_finish_backup(self, c: Choices) -> None:
        """Most often the oldest one, with ids; else another, none, a wrong number, or a node that is not pending."""
        waiting = list(self.backups)
        node = waiting[0] if waiting and c.below(4) else self.pick(c, waiting)
        if node is None or c.below(12) == 1:
            node = self.some_node(c)
        if node is None:
            return
        ids = None
        if c.below(5) != 1:
            ids = self.host.take(self._about(self.backups.get(node, 1), c), c)
        pair = self.call("finish_backup", ids, node=node, exact=False)
        if pair is None:
            self.host.put(ids or [])
            return
        require(node in self.backups, "finish_backup of a node that was not pending", node)
        del self.backups[node]
        self.same_departures(pair, ordered=True)

    def _about(self, count: int, c: Choices) -> int:
        """A number of ids: the right one, or rarely one beside it."""
        return max(0, count + c.below(3) - 1) if c.below(8) == 1 else count

    def op_begin_write(self, c: Choices) -> None:
        """A write-through copies a node while the tree goes on, locked and marked; set_host comes later. Now and then
        somebody copies a node that nobody locks."""
        node = self.some_node(c)
        if node is None:
            return
        infos = self.call("node_info", node=node) if node[0] != ROOT else None
        if c.below(4) == 1:
            if infos is not None:
                ids = self.host.take(len(infos[0].tokens) // self.page_size, c)
                self.writes += [(node, ids, None)] if ids is not None else []
            return
        marks = (1, 2, 4, 6, 0, 256)[c.below(6)]
        pair = self.call("begin_write", marks, node=node, exact=False)
        if pair is None:
            return
        assert infos is not None
        due = _is_due(infos[0], "host", 0, marks)
        require([pages is not None for pages in pair] == [due, due], "a write began", due, *pair)
        if not due:
            return
        pages = self.same_ids("device pages of a write", *pair)
        self.same("device pages of a write", pages, infos[0].page_ids.tolist())
        for before, after in zip(infos, self.call("node_info", node=node) or (), strict=True):
            self.same("locks of a node that is written", after.lock_ref, before.lock_ref + 1)
            self.same("marks of a node that is written", after.marks, before.marks | marks)
        self.locks.append(node)
        ids = self.host.take(len(pages), c)
        if ids is None:  # as a controller without room on the host
            self._end_write(node, len(pages), marks)
        else:
            self.writes.append((node, ids, marks))

    def _end_write(self, node: Pair, num_pages: int, marks: int) -> None:
        """Take back what begin_write did; op_unlock may have been there before, and its node have gone."""
        if marks:
            self.call("mark", 0, marks, num_pages, node=node)
        if node in self.locks:
            require(self.call("unlock", node=node) is not None, "the lock of a write", node)
            self.locks.remove(node)

    def op_set_host(self, c: Choices) -> None:
        marks = None
        if self.writes and c.below(8) != 1:
            node, ids, marks = self.writes.pop(c.below(len(self.writes)))
            exact = True
        else:
            node, ids = self.some_node(c), self.host.take(c.below(4), c)
            exact = False
        if node is None or ids is None:
            self.host.put(ids or [])
            return
        num_pages = len(ids)
        if self.call("set_host", ids, node=node, exact=exact) is None:
            self.host.put(ids)
        if marks is not None:
            self._end_write(node, num_pages, marks)

    def op_load_back(self, c: Choices) -> None:
        """As an engine does it: match, then load the first host-only node of the hit. Or any node at all."""
        if c.below(6):
            namespace = c.below(len(NAMESPACES))
            tokens = self.tokens(self.some_key(c), c)
            pair = self.same_match(self.call("match", tokens, **NAMESPACES[namespace]), namespace)
            node = (pair[0].host_node, pair[1].host_node)
            top = pair[0].device_node
            while node[0] != ROOT:
                parent = tuple(info.parent for info in self.call("node_info", node=node))
                if parent[0] == top:
                    break
                node = self.same_node(*parent)
        else:
            node = self.some_node(c)
        if node is None or (node[0] == ROOT and c.below(16)):
            return
        infos = self.call("node_info", node=node) if node[0] != ROOT else None
        count = 1 if infos is None else len(infos[0].tokens) // self.page_size
        ids = self.device.take(self._about(count, c), c)
        if ids is None:
            return
        loading = bool(c.below(3))
        if self.call("set_device", ids, loading, node=node, exact=False) is None:
            self.device.put(ids)
        elif loading:
            self.loads.append(node)

    def op_finish_load(self, c: Choices) -> None:
        node = self.pick(c, self.loads) if c.below(10) != 1 else self.some_node(c)
        if node is None:
            return
        pair = self.call("finish_load", c.below(3) != 1, node=node)
        if pair is not None:
            require(node in self.loads, "finish_load of a node that was not loading", node)
            self.loads.remove(node)
            self.same_departures(pair, ordered=True)

    # ---- operations: marks, and the nodes of a path ------------------------------------------------------------------

    def op_mark(self, c: Choices) -> None:
        """Most often one node; else the last pages of its path, now and then a number that ends inside a node."""
        node = self.some_node(c)
        if node is None:
            return
        on, off = c.below(8), c.below(8)
        if c.below(6):
            off &= ~on
        if c.below(24) == 1:
            on += 256
        pages = None
        if c.below(3) == 0:
            pages = c.below(self.longest)
            infos = self.call("node_info", node=node) if node[0] != ROOT and c.below(3) else None
            if infos is not None:  # the node and its parent, as if it had been split while a copy ran
                above = self.call("node_info", node=(infos[0].parent, infos[1].parent)) if infos[0].parent else None
                pages = sum(len(info[0].tokens) for info in (infos, above) if info is not None) // self.page_size
        self.call("mark", on, off, pages, node=node, exact=False)

    def op_due(self, c: Choices) -> None:
        """What a controller asks after each insert: the answer follows from the infos of the path."""
        node = self.some_node(c)
        if node is None:
            return
        tier = (*("host", "storage") * 6, "device")[c.below(13)]
        hits, without = c.below(4), (0, 1, 6, 255)[c.below(4)]
        pair = self.call("due", tier, hits, without, node=node, exact=False)
        path = self.call("path", node=node)
        tail = self.call("host_path", node=node)
        if path is None:
            return
        nodes = [self.same_node(a, b) for a, b in zip(*path, strict=True)]
        require(nodes[-1:] == ([node] if node[0] != ROOT else []), "the end of a path", nodes, node)
        infos = [self.call("node_info", node=pair)[0] for pair in nodes]
        parents = [info.parent for info in infos]
        self.same("parents along a path", parents, [ROOT, *path[0]][: len(parents)])
        for at in range(2):
            host_only = [pair[at] for pair, info in zip(nodes, infos, strict=True) if info.page_ids is None]
            self.same("host_path", tail[at], host_only)
            if pair is not None:
                self.same("due", pair[at], [pair[at] for pair, info in zip(nodes, infos, strict=True)
                                            if _is_due(info, tier, hits, without)])

    # ---- operations: structure ---------------------------------------------------------------------------------------

    def op_split_at(self, c: Choices) -> None:
        node = self.some_node(c)
        if node is not None:
            at = c.below(6) * self.page_size + (c.below(3) - 1 if c.below(6) == 1 else 0)
            pair = self.call("split_at", at, node=node)
            if pair is not None:
                self.same_node(*pair)

    def op_delete(self, c: Choices) -> None:
        node = self.some_node(c)
        if node is not None:
            self.same_departures(self.call("delete", node=node), ordered=False)

    def op_delete_namespace(self, c: Choices) -> None:
        if c.below(4) == 0:
            out = self.call("delete_namespace", **NAMESPACES[c.below(len(NAMESPACES))])
            self.same_departures(out, ordered=False)

    def op_reset(self, c: Choices) -> None:
        if c.below(8) == 0:
            writes = [page for _, ids, _ in self.writes for page in ids]
            self._nothing_under_way()
            self.same_departures(self.call("reset"), ordered=False)
            self.host.put(writes)

    # ---- operations: inspection --------------------------------------------------------------------------------------

    def op_node_info(self, c: Choices) -> None:
        node = self.some_node(c)
        pair = self.call("node_info", node=node) if node is not None else None
        if pair is not None:
            self.same_info(*pair)

    def op_host_pages(self, c: Choices) -> None:
        node = self.some_node(c)
        pair = self.call("host_pages", node=node) if node is not None else None
        if pair is not None:
            infos = self.call("node_info", node=node)
            assert infos is not None
            for (parent, ids), info in zip(pair, infos, strict=True):
                told = None if info.host_page_ids is None else info.host_page_ids.tolist()
                self.same("host pages", (parent, None if ids is None else ids.tolist()), (info.parent, told))
            self.same_node(pair[0][0], pair[1][0])

    def op_page_keys(self, c: Choices) -> None:
        node = self.some_node(c)
        pair = self.call("page_keys", node=node) if node is not None else None
        if pair is not None:
            self.same("page keys", pair[0].tolist(), pair[1].tolist())
            a, b = self.call("page_digests", node=node)
            self.same("page digests", a.tolist(), b.tolist())
            self.same("keys and digests", pair[0].astype(">u8").tobytes(), a.tobytes())

    def op_look(self, c: Choices) -> None:
        self.check()

    def same_info(self, a: Any, b: Any) -> None:
        self.same_node(a.node, b.node)
        self.same_node(a.parent, b.parent)
        self.same("node", plain(a)[2:], plain(b)[2:])

    # ---- after each step, and now and then ---------------------------------------------------------------------------

    def step(self, operation: str, c: Choices) -> None:
        getattr(self, operation)(c)
        if self.events:
            self.hear(c)

    def hear(self, c: Choices) -> None:
        """Drain both queues, in batches. Siblings may leave in any order: then the content must agree. If events were
        dropped, do what a consumer must: discard what is queued, and read the dump."""
        dropped, queued = zip(*((stats.dropped_events, stats.queued_events)
                                for stats in (tree.stats() for tree in (self.a, self.b))), strict=True)
        self.same("events dropped", *dropped)
        require(self.same("events queued", *queued) <= self.max_events, "too many events queued", queued)
        if dropped[0] != self.dropped_events:
            self.same("events queued when one is dropped", queued[0], self.max_events)
            self.dropped_events = dropped[0]
            for tree, mirror in zip((self.a, self.b), self.mirrors, strict=True):
                require(len(tree.take_events()) == queued[0], "events queued", queued[0])
                mirror.read(tree)
            return
        limit = c.below(12) if c.below(16) == 1 else None
        heard: list[list[Any]] = [[], []]
        for at, tree in enumerate((self.a, self.b)):
            if limit is not None:
                heard[at] += map(plain_event, tree.take_events(limit))
                require(len(heard[at]) <= limit, "too many events", len(heard[at]), limit)
            heard[at] += map(plain_event, tree.take_events())
            for event in heard[at]:
                self.mirrors[at].hear(event)
        if heard[0] != heard[1]:
            self.same("events", sorted(heard[0], key=repr), sorted(heard[1], key=repr))

    def check(self) -> None:
        """Compare everything that can be seen, and check both trees from within."""
        if self.events:
            self.hear(_Zero())
        held = [page for _, ids, _ in self.writes for page in ids]
        free, host_free = self.device.free, self.host.free + held
        for tree in (self.a, self.b):
            tree.check_integrity(self.device.capacity, free, self.host.capacity, host_free)
        ours, theirs = self.a.dump(), self.b.dump()
        self.same("number of nodes", len(ours), len(theirs))
        self.live = []
        for a, b in zip(ours, theirs, strict=True):
            self.same_info(a, b)
            self.live.append((a.node, b.node))
        apart = {"memory_bytes": 0, "digest_memory_bytes": 0}
        stats = self.same("stats", *(tree.stats()._replace(**apart) for tree in (self.a, self.b)))
        self.same("len", len(self.a), len(self.b))
        self.same("nodes", stats.nodes, len(ours))
        for at, tree in enumerate((self.a, self.b)):
            self.same("iteration", list(tree), [pair[at] for pair in self.live])
            self.same("edges in to_dot", tree.to_dot().count("->"), len(ours))
        self._check_stats(ours, stats)
        if self.events:
            self._check_mirror(ours)
        self._forget()

    def _check_stats(self, nodes: list[Any], stats: Any) -> None:
        """The counters follow from the dump alone (the protected ones: see check_integrity)."""
        device = sum(len(info.tokens) for info in nodes if info.page_ids is not None)
        self.same("device tokens", stats.evictable_tokens + stats.protected_tokens, device)
        host = sum(len(info.tokens) for info in nodes if info.host_page_ids is not None)
        self.same("host tokens", stats.host_tokens, host)
        pending = sum(len(info.tokens) for info in nodes if info.backup_pending)
        self.same("pending tokens", stats.pending_tokens, pending)
        loading = sum(len(info.tokens) for info in nodes if info.loading)
        self.same("loading tokens", stats.loading_tokens, loading)
        self.same("pinned nodes", stats.pinned_nodes, sum(info.pinned_until_ns is not None for info in nodes))
        self.same("namespaces", stats.namespaces, len({info.namespace for info in nodes}))
        held: set[int] = set()
        for info in reversed(nodes):  # children first
            if info.host_ref or info.node in held:
                held.add(info.node)
                held.add(info.parent)
        tokens = sum(len(info.tokens) for info in nodes if info.page_ids is None and info.node not in held)
        self.same("tokens that may leave the host", stats.host_evictable_tokens, tokens)
        protected: set[int] = set()
        for info in reversed(nodes):  # children first
            if info.lock_ref or info.loading or info.pinned_until_ns is not None or info.node in protected:
                protected.add(info.node)
                protected.add(info.parent)
        tokens = sum(len(info.tokens) for info in nodes if info.node in protected)
        self.same("protected tokens", stats.protected_tokens, tokens)

    def _check_mirror(self, nodes: list[Any]) -> None:
        for at, tree in enumerate((self.a, self.b)):
            for medium, field in (("device", "page_ids"), ("host", "host_page_ids")):
                keys = {int(key) for info, pair in zip(nodes, self.live, strict=True)
                        if getattr(info, field) is not None for key in tree.page_keys(pair[at])}
                self.same(f"{medium} pages by events and by dump", set(self.mirrors[at].parents[medium]), keys)

    def _forget(self) -> None:
        """Drop the names of nodes that left, but for those that may be tried again."""
        keep = {ROOT: ROOT, **dict(self.live), **dict(self.recent)}
        for a, b, _ in self.matches:
            keep |= {a.device_node: b.device_node, a.host_node: b.host_node}
        for under_way in (self.locks, self.host_locks, self.backups, self.loads, [node for node, *_ in self.writes]):
            keep |= dict(under_way)
        self.to_b = keep
        self.to_a = {b: a for a, b in keep.items()}

    def finish(self) -> None:
        """Let go of everything: then both trees must empty, and every page must be back."""
        for node in self.locks:
            self.call("unlock", node=node)
        for node in self.host_locks:
            self.call("release_host", node=node)
        for node in self.loads:
            self.same_departures(self.call("finish_load", node=node), ordered=True)
        for node in list(self.backups):
            self.same_departures(self.call("finish_backup", None, node=node), ordered=True)
        for _, ids, _ in self.writes:
            self.host.put(ids)
        self._nothing_under_way()
        self.call("expire", 2**63 - 1)
        self.check()
        self.same_departures(self.call("evict", 1 << 40), ordered=True)
        self.same_departures(self.call("evict_host", 1 << 40), ordered=True, host_ordered=True)
        self.check()
        self.same("nodes left", len(self.a), 0)
        self.same("device pages back", sorted(self.device.free), list(range(self.device.capacity)))
        self.same("host pages back", sorted(self.host.free), list(range(self.host.capacity)))


def _is_due(info: Any, tier: str, hits: int, without: int) -> bool:
    if info.hit_count < hits or info.marks & without:
        return False
    if tier == "storage":
        return info.host_page_ids is not None
    return info.page_ids is not None and info.host_page_ids is None and not (info.loading or info.backup_pending)


class _Zero:
    def below(self, n: int) -> int:
        return 0


WEIGHTS: dict[str, int] = {
    "op_match": 10, "op_peek": 3, "op_peek_many": 1, "op_match_extend": 5, "op_insert": 16, "op_insert_host": 6,
    "op_lock": 6, "op_unlock": 7, "op_unlock_above": 1, "op_prefetch": 5, "op_protect_host": 2, "op_release_host": 5,
    "op_pin": 2, "op_unpin": 2,
    "op_expire": 2,
    "op_evict": 4, "op_evict_backup": 5, "op_evict_host": 2, "op_evict_everything": 1, "op_finish_backup": 9,
    "op_begin_write": 5, "op_set_host": 4, "op_load_back": 6, "op_finish_load": 5, "op_split_at": 3, "op_delete": 1,
    "op_delete_namespace": 1, "op_reset": 1, "op_node_info": 1, "op_page_keys": 1,
    "op_mark": 4, "op_due": 4, "op_host_pages": 2,
}  # fmt: skip
"""How often the fuzzer takes each operation."""
