"""L1: the radix tree in plain Python: the oracle of the fast core, and the place to read what an operation means.

Every operation has two halves: first all arguments are read and every condition is checked, then the tree is changed,
and nothing in the second half can fail. Costs are not the point here (eviction looks at all nodes, stats() counts
them), but no function recurses along the depth of the tree.

Drawings: a node is [tokens | device pages | host pages] with one letter a page, - for "not on this tier".
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import (
    ArgumentTypeError,
    HandleError,
    InvalidArgumentError,
    LockError,
    PageOwnershipError,
    StateError,
)
from ..key import NamespacePart, encode_namespace
from ..types import POLICIES, ROOT, BackupRequest, Event, Medium, NextTier, NodeInfo, Policy, TreeStats
from .base import BaseRadixTree, Tokens
from .base import MatchResult as AnyMatch
from .reference_check import check_tree
from .reference_node import (
    POLICY_KEYS,
    Departures,
    EvictResult,
    HandleTable,
    InsertHostResult,
    InsertResult,
    MatchResult,
    Node,
    below,
    id_array,
    namespace_digest,
    page_digest,
    parent_of,
    path_down,
    path_length,
    path_tokens,
    path_up,
    subtree,
)
from .render import render_dot
from .tokens import INT32_MAX, INT32_MIN, read_int, read_tokens

__all__ = ["ReferenceTree"]

_tree_ids = itertools.count(1)

Key = tuple[int, ...]


class _Step(NamedTuple):
    """One node of a walk and how many of its tokens the key covers (all of them, but for the last step)."""

    node: Node
    used: int


class ReferenceTree(BaseRadixTree):
    """BaseRadixTree in plain Python; see there for the contract."""

    def __init__(
        self, page_size: int = 16, policy: Policy = "lru", *, events: bool = False, max_events: int = 1 << 20
    ) -> None:
        self.page_size = read_int(page_size, "page_size", 1, 65_536)
        if policy not in POLICIES:
            raise InvalidArgumentError(f"policy is {policy!r}, not one of {', '.join(POLICIES)}")
        self.policy = policy
        self._tree_id = next(_tree_ids)
        self._policy_key = POLICY_KEYS[policy]
        self._clock = 0
        self._roots: dict[bytes, Node] = {}  # only namespaces that have nodes
        self._handles = HandleTable(self._tree_id)
        self._device_ids: set[int] = set()  # every page id that some node owns, by tier
        self._host_ids: set[int] = set()
        self.events = bool(events)
        self._events: deque[Event] | None = deque() if events else None
        self._max_events = read_int(max_events, "max_events", 1)
        self._dropped_events = 0

    # ---- look-up -----------------------------------------------------------------------------------------------------

    def match(self, tokens: Tokens, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> MatchResult:
        return self._match(encode_namespace(extra_key, cache_salt), self._read_key(tokens))

    def peek(self, tokens: Tokens, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> MatchResult:
        namespace = encode_namespace(extra_key, cache_salt)
        return self._describe(namespace, self._walk(namespace, self._read_key(tokens)))

    def peek_many(
        self, keys: Sequence[Tokens], extra_key: NamespacePart = None, cache_salt: NamespacePart = None
    ) -> npt.NDArray[np.int64]:
        if not isinstance(keys, Sequence | np.ndarray):
            raise ArgumentTypeError(f"keys must be a sequence of keys, not {type(keys).__name__}")
        hits = [self.peek(key, extra_key, cache_salt) for key in keys]
        return np.array([(hit.num_tokens, hit.host_num_tokens) for hit in hits], dtype=np.int64).reshape(len(hits), 2)

    def match_extend(self, match: AnyMatch, tokens: Tokens) -> MatchResult:
        match = self._own_match(match)
        more = self._read_key(tokens)
        end = self._node(match.host_node)
        hit = match.num_tokens + match.host_num_tokens
        if end is not None and path_length(end) != hit:
            raise InvalidArgumentError(f"the match of {hit} tokens ends inside a node that ends at {path_length(end)}")
        return self._match(match.namespace, (path_tokens(end) if end is not None else ()) + more)

    def _match(self, namespace: bytes, key: Key) -> MatchResult:
        steps = self._cut(self._walk(namespace, key))
        self._tick_and_stamp(steps)
        return self._describe(namespace, steps)

    def _describe(self, namespace: bytes, steps: list[_Step]) -> MatchResult:
        result = MatchResult(self._tree_id, namespace)
        for node, used in steps:
            result.extend(node, used, self.page_size)
        return result

    def _walk(self, namespace: bytes, key: Key) -> list[_Step]:
        """Follow a key down from the root of its namespace as far as it goes, on either tier."""
        steps: list[_Step] = []
        node = self._roots.get(namespace)
        at, page = 0, self.page_size
        while node is not None and at < len(key):
            node = node.children.get(key[at : at + page])
            if node is None:
                break
            used = self._common(node.tokens, key[at : at + len(node.tokens)])
            steps.append(_Step(node, used))
            at += used
            if used < len(node.tokens):
                break
        return steps

    def _common(self, run: Key, key: Key) -> int:
        """Length of the common prefix of two runs, in whole pages."""
        if run == key:
            return len(run)
        page = self.page_size
        at = 0
        while at < len(key) and run[at : at + page] == key[at : at + page]:
            at += page
        return at

    def _cut(self, steps: list[_Step]) -> list[_Step]:
        """Split the last node of a walk where the walk ends, if it ends inside."""
        if steps and steps[-1].used < len(steps[-1].node.tokens):
            node, used = steps[-1]
            return [*steps[:-1], _Step(self._split(node, used), used)]
        return steps

    def _tick_and_stamp(self, steps: list[_Step]) -> None:
        self._clock += 1
        for node, _ in steps:
            node.access_time = self._clock

    # ---- growth ------------------------------------------------------------------------------------------------------

    def insert(
        self,
        tokens: Tokens,
        page_ids: Tokens,
        match: AnyMatch | None = None,
        extra_key: NamespacePart = None,
        cache_salt: NamespacePart = None,
        priority: int = 0,
    ) -> InsertResult:
        # insert([a b c d e], pages [1 2 3 4 5]):
        #
        #   [a b | 1 9 | -] -- [c x | - | 7 8]             before
        #
        #   [a b | 1 9 | -] -- [c | 3 | 7] -- [x | - | 8]  2 is a duplicate; c adopts 3 and keeps 7; prefix_tokens: a b
        #                                  \- [d e | 4 5 | -]
        namespace, key, ids, priority = self._read_insert(tokens, page_ids, match, extra_key, cache_salt, priority)
        steps = self._walk(namespace, key)
        present = [page for node, used in steps for page in (node.pages or [])[: used // self.page_size]]
        self._check_owner(ids, present, self._device_ids, "page")

        steps = self._cut(steps)
        self._tick_and_stamp(steps)
        at = 0
        adopted: list[int] = []
        for node, used in steps:
            node.priority = max(node.priority, priority)
            if node.pages is not None:
                node.hit_count += 1
            else:
                adopted += node.host_pages or []
                self._enter_device(node, ids[at // self.page_size : (at + used) // self.page_size])
            at += used
        end = steps[-1].node if steps else None
        if at < len(key):
            end = self._grow(end, namespace, key[at:], priority, hit_count=1)
            self._enter_device(end, ids[at // self.page_size :])
        duplicates = [mine for mine, here in zip(ids, present, strict=False) if mine != here]
        return InsertResult(len(present) * self.page_size, end.handle if end else ROOT, duplicates, adopted)

    def insert_host(
        self,
        tokens: Tokens,
        host_page_ids: Tokens,
        match: AnyMatch | None = None,
        extra_key: NamespacePart = None,
        cache_salt: NamespacePart = None,
        priority: int = 0,
    ) -> InsertHostResult:
        # insert_host([a b c d], host pages [5 6 7 8]):
        #
        #   [a | 1 | -] -- [b | - | 9]                    before
        #   [a | 1 | -] -- [b | - | 9] -- [c d | - | 7 8]  5 and 6 are duplicates
        namespace, key, ids, priority = self._read_insert(tokens, host_page_ids, match, extra_key, cache_salt, priority)
        steps = self._walk(namespace, key)
        present: list[int | None] = []
        for node, used in steps:
            pages = used // self.page_size
            present += node.host_pages[:pages] if node.host_pages is not None else [None] * pages
        self._check_owner(ids, present, self._host_ids, "host page")

        steps = self._cut(steps)
        self._tick_and_stamp(steps)
        for node, _ in steps:
            node.priority = max(node.priority, priority)
        end = steps[-1].node if steps else None
        if len(present) < len(ids):
            end = self._grow(end, namespace, key[len(present) * self.page_size :], priority, hit_count=0)
            self._enter_host(end, ids[len(present) :])
        duplicates = [mine for mine, here in zip(ids, present, strict=False) if mine != here]
        return InsertHostResult(len(present) * self.page_size, end.handle if end else ROOT, duplicates)

    def _read_insert(
        self,
        tokens: Tokens,
        ids: Tokens,
        match: AnyMatch | None,
        extra_key: NamespacePart,
        cache_salt: NamespacePart,
        priority: int,
    ) -> tuple[bytes, Key, list[int], int]:
        namespace = encode_namespace(extra_key, cache_salt)
        key = self._read_key(tokens)
        pages = self._read_ids(ids, len(key) // self.page_size)
        priority = read_int(priority, "priority", INT32_MIN, INT32_MAX)
        if match is not None:
            # The hint has no other use here: this implementation always walks from the root.
            match = self._own_match(match)
            hit = match.num_tokens + match.host_num_tokens
            if match.namespace != namespace:
                raise InvalidArgumentError(f"the match is of namespace {match.namespace!r}, the key of {namespace!r}")
            if hit > len(key):
                raise InvalidArgumentError(f"the match is {hit} tokens long, the key only {len(key)}")
        return namespace, key, pages, priority

    def _grow(self, parent: Node | None, namespace: bytes, tokens: Key, priority: int, hit_count: int) -> Node:
        """Hang a new node below ``parent`` (None: below the root of the namespace). It is on neither tier yet."""
        if parent is None:
            parent = self._roots.setdefault(namespace, Node(ROOT, namespace, None, ()))
        node = Node(ROOT, namespace, parent, tokens, priority=priority, hit_count=hit_count)
        node.access_time = node.created_time = self._clock
        self._handles.issue(node)
        parent.children[tokens[: self.page_size]] = node
        return node

    # ---- protection --------------------------------------------------------------------------------------------------

    def lock(self, node: int) -> int:
        target = self._node(node)
        if target is None:
            return 0
        self._require_device(target)
        change = 0
        for part in path_up(target):
            change -= 0 if part.is_protected else len(part.tokens)
            part.lock_ref += 1
        return change

    def unlock(self, node: int) -> int:
        target = self._node(node)
        if target is None:
            return 0
        self._require_device(target)
        own = target.lock_ref - sum(child.lock_ref for child in target.children.values())
        if own < 1:
            raise LockError(f"node {target.handle:#x} has no lock to undo: all {target.lock_ref} are of nodes below")
        change = 0
        for part in path_up(target):
            part.lock_ref -= 1
            change += 0 if part.is_protected else len(part.tokens)
        return change

    def protect_host(self, node: int) -> None:
        target = self._node(node)
        if target is None:
            return
        if target.host_pages is None:
            raise StateError(f"node {target.handle:#x} has no host copy to protect")
        target.host_ref += 1

    def release_host(self, node: int) -> None:
        target = self._node(node)
        if target is None:
            return
        if target.host_ref == 0:
            raise LockError(f"node {target.handle:#x} has host_ref 0")
        target.host_ref -= 1

    def pin(self, node: int, until_ns: int) -> int:
        target = self._proper_node(node, "pin")
        until = read_int(until_ns, "until_ns")
        self._require_device(target)
        change = self._add_pin_ref(target, +1) if target.pin_until is None else 0
        target.pin_until = until
        return change

    def unpin(self, node: int) -> int:
        target = self._node(node)
        return self._unpin(target) if target is not None else 0

    def expire(self, now_ns: int) -> int:
        now = read_int(now_ns, "now_ns")
        due = [node for node in self._handles.nodes() if node.pin_until is not None and node.pin_until <= now]
        for node in due:
            self._unpin(node)
        return len(due)

    def _unpin(self, node: Node) -> int:
        if node.pin_until is None:
            return 0
        node.pin_until = None
        return self._add_pin_ref(node, -1)

    def _add_pin_ref(self, node: Node, change: int) -> int:
        """Protect (+1) or release (-1) a path for a pin or a load. Returns the change of evictable tokens."""
        evictable = 0
        for part in path_up(node):
            before = part.is_protected
            part.pin_ref += change
            if part.is_protected != before:
                evictable += len(part.tokens) if before else -len(part.tokens)
        return evictable

    # ---- eviction ----------------------------------------------------------------------------------------------------

    def evict(self, num_tokens: int, backup: bool = False) -> EvictResult:
        # evict(2 pages):                                   evict(1 page, backup=True), then finish_backup(b, [8]):
        #
        #   [a | 1 | 5] -- [b | 2 | 6] -- [c | - | 7]         [a | 1 | 5] -- [b | 2 | -]
        #   [a | 1 | 5] -- [b | - | 6] -- [c | - | 7]         [a | 1 | 5] -- [b | 2 pending | -]
        #   [a | - | 5] -- [b | - | 6] -- [c | - | 7]         [a | 1 | 5] -- [b | - | 8]
        wanted = read_int(num_tokens, "num_tokens", 0)
        out = Departures(self.page_size)
        queue = self._queue(lambda node: self._may_leave_device(node, backup))
        held = 0
        while queue and out.device_tokens + out.backup_tokens + held < wanted:
            node = heapq.heappop(queue)[-1]
            parent = parent_of(node)
            if node.host_pages is not None:
                self._leave_device(node, out)
            elif backup:
                node.pending = True
                out.to_backup.append(BackupRequest(node.handle, id_array(node.pages or ())))
                held += self._held_back(node)
            else:
                self._remove_subtree(node, out)
            # The parent may be a candidate now. If it is pending already, then what it counts as gone for may be one.
            while parent.pending:
                parent = parent_of(parent)
            if self._may_leave_device(parent, backup):
                heapq.heappush(queue, self._queue_entry(parent))
        return out.result()

    def _held_back(self, node: Node) -> int:
        """Tokens above a node that has just become pending: those with a host copy that wait for such backups alone."""
        #   [a | 1 | 5] -- [b | 2 | 6] -- [c | 3 pending | -]      a and b go as soon as c has
        top, tokens = node, 0
        while top.pending and _gone_below(top):
            top = parent_of(top)
        if not _gone_below(top):
            return 0
        while top.host_pages is not None and not top.pending and not top.is_protected:
            tokens += len(top.tokens)
            top = parent_of(top)
            if sum(child.on_device for child in top.children.values()) != 1:
                break
        return tokens

    def evict_host(self, num_tokens: int) -> EvictResult:
        #   [a | 1 | 5] -- [b | - | 6] -- [c | - | 7]      before
        #   [a | 1 | 5]                                    evict_host(2 pages): 7, then 6
        wanted = read_int(num_tokens, "num_tokens", 0)
        out = Departures(self.page_size)
        queue = self._queue(self._may_leave_host)
        while queue and out.host_tokens < wanted:
            node = heapq.heappop(queue)[-1]
            parent = parent_of(node)
            self._remove(node, out)
            if self._may_leave_host(parent):
                heapq.heappush(queue, self._queue_entry(parent))
        return out.result(out.host_tokens)

    def _queue(self, accept: Callable[[Node], bool]) -> list[tuple[tuple[int, ...], int, int, Node]]:
        queue = [self._queue_entry(node) for node in self._handles.nodes() if accept(node)]
        heapq.heapify(queue)
        return queue

    def _queue_entry(self, node: Node) -> tuple[tuple[int, ...], int, int, Node]:
        # Equal key and creation time: parts of one node, never candidates at once. So the handle decides nothing.
        return self._policy_key(node), -node.created_time, node.handle, node

    def _may_leave_device(self, node: Node, backup: bool) -> bool:
        if node.is_root or not node.on_device or node.is_protected or node.pending:
            return False
        if node.host_pages is not None:
            return not node.has_device_child()
        if not backup:
            return not node.has_device_child() and _nothing_host_protected(node)
        return _gone_below(node) and _nothing_host_protected(node)

    def _may_leave_host(self, node: Node) -> bool:
        return not node.is_root and not node.on_device and not node.children and node.host_ref == 0

    # ---- the two tiers -----------------------------------------------------------------------------------------------

    def finish_backup(self, node: int, host_page_ids: Tokens | None) -> EvictResult:
        target = self._proper_node(node, "finish_backup")
        self._require_job(target, target.pending, "pending")
        parts = self._job_parts(target)
        ids: list[int] = []
        if host_page_ids is not None:
            ids = self._read_ids(host_page_ids, sum(len(part.tokens) for part in parts) // self.page_size)
            self._check_owner(ids, [], self._host_ids, "host page")

        out = Departures(self.page_size)
        self._end_job(parts)
        if host_page_ids is None:
            for part in reversed(parts):
                if not (part.is_protected or part.has_device_child()) and _nothing_host_protected(part):
                    self._remove_subtree(part, out)
            return out.result()
        self._enter_host_parts(parts, ids)
        for part in reversed(parts):
            if not (part.is_protected or part.has_device_child()):
                self._leave_device(part, out)
        return out.result()

    def set_host(self, node: int, host_page_ids: Tokens) -> None:
        # set_host(y, [7 8 9]), y having been split from x while the copy ran:
        #
        #   [a b | 1 2 | -] -- [c | 3 | -]       x, y before
        #   [a b | 1 2 | 7 8] -- [c | 3 | 9]     after
        target = self._proper_node(node, "set_host")
        ids = self._read_ids(host_page_ids)
        parts = self._last_parts(target, len(ids), "set_host")
        for part in parts:
            if part.host_pages is not None or part.pages is None or part.pending:
                state = "pending" if part.pending else "on the host already" if part.pages is not None else "host-only"
                raise StateError(f"node {part.handle:#x}, covered by the {len(ids)} host pages, is {state}")
        self._check_owner(ids, [], self._host_ids, "host page")
        self._enter_host_parts(parts, ids)

    def _last_parts(self, node: Node, pages: int, operation: str) -> list[Node]:
        """The nodes that hold exactly the last ``pages`` pages of a node's path, uppermost first."""
        parts: list[Node] = []
        covered = 0
        for part in path_up(node):
            if covered >= pages:
                break
            parts.insert(0, part)
            covered += len(part.tokens) // self.page_size
        if pages < 1 or covered != pages:
            raise InvalidArgumentError(f"{operation}: {pages} pages above the end of node {node.handle:#x} do not "
                                       f"begin at a node boundary (the next one: {covered})")
        return parts

    def set_device(self, node: int, page_ids: Tokens, loading: bool = False) -> None:
        #   [a | 1 | 5] -- [b | - | 6]      before
        #   [a | 1 | 5] -- [b | 2 | 6]      set_device(b, [2])
        target = self._proper_node(node, "set_device")
        ids = self._read_ids(page_ids, len(target.tokens) // self.page_size)
        if target.on_device:
            raise StateError(f"node {target.handle:#x} has device pages already")
        parent = target.parent
        assert parent is not None
        if not parent.is_root and not parent.on_device:
            raise StateError(f"the parent {parent.handle:#x} of node {target.handle:#x} is host-only")
        self._check_owner(ids, [], self._device_ids, "page")
        self._enter_device(target, ids)
        if loading:
            target.loading = True
            self._add_pin_ref(target, +1)

    def finish_load(self, node: int, success: bool = True) -> EvictResult:
        target = self._proper_node(node, "finish_load")
        self._require_job(target, target.loading, "loading")
        parts = self._job_parts(target)
        if not success:
            for part in parts:
                others = [child for child in part.children.values() if child.on_device and child not in parts]
                if part.lock_ref or others:
                    raise LockError(f"the load of node {target.handle:#x} failed, but its part {part.handle:#x} has "
                                    f"{part.lock_ref} locks and {len(others)} children on the device")
        out = Departures(self.page_size)
        self._end_job(parts)
        self._add_pin_ref(target, -1)
        if not success:
            for part in reversed(parts):
                self._unpin(part)
                self._leave_device(part, out)
        return out.result()

    def _require_job(self, node: Node, flag: bool, name: str) -> None:
        if not flag:
            raise StateError(f"node {node.handle:#x} is not {name}")
        if node.is_job_part:
            raise StateError(f"node {node.handle:#x} is only a part split off a {name} node: use that one's handle")

    def _job_parts(self, node: Node) -> list[Node]:
        """The node that a job was started on, as the parts that it has become since: uppermost first."""
        parts = [node]
        above = node.job_pages_above * self.page_size
        while above > 0:
            part = parts[0].parent
            assert part is not None
            assert part.is_job_part
            parts.insert(0, part)
            above -= len(part.tokens)
        assert above == 0
        return parts

    def _end_job(self, parts: list[Node]) -> None:
        for part in parts:
            part.loading = part.pending = part.is_job_part = False
            part.job_pages_above = 0

    # ---- what a controller keeps on the tree, and asks of it ---------------------------------------------------------

    def mark(self, node: int, set: int = 0, clear: int = 0, num_pages: int | None = None) -> None:
        target = self._proper_node(node, "mark")
        on, off = read_int(set, "set", 0, 255), read_int(clear, "clear", 0, 255)
        if on & off:
            raise InvalidArgumentError(f"mark: set {on:#x} and clear {off:#x} share the bits {on & off:#x}")
        pages = None if num_pages is None else read_int(num_pages, "num_pages")
        for part in [target] if pages is None else self._last_parts(target, pages, "mark"):
            part.marks = part.marks & ~off | on

    def due(self, node: int, tier: NextTier, min_hits: int, without_marks: int = 0) -> list[int]:
        if tier not in ("host", "storage"):
            raise InvalidArgumentError(f"due: tier is {tier!r}, not 'host' or 'storage'")
        hits, refused = read_int(min_hits, "min_hits", 0), read_int(without_marks, "without_marks", 0, 255)

        def lacks_copy(part: Node) -> bool:
            if tier == "storage":
                return part.host_pages is not None
            return part.on_device and part.host_pages is None and not (part.loading or part.pending)

        path = path_down(self._node(node))
        return [part.handle for part in path
                if part.hit_count >= hits and not part.marks & refused and lacks_copy(part)]

    def path(self, node: int) -> list[int]:
        return [part.handle for part in path_down(self._node(node))]

    def host_path(self, node: int) -> list[int]:
        return [part.handle for part in path_down(self._node(node)) if not part.on_device]

    # ---- structure ---------------------------------------------------------------------------------------------------

    def split_at(self, node: int, num_tokens: int) -> int:
        target = self._proper_node(node, "split_at")
        at = read_int(num_tokens, "num_tokens")
        if not 0 < at < len(target.tokens) or at % self.page_size:
            raise InvalidArgumentError(
                f"cannot split a node of {len(target.tokens)} tokens at {at} (page_size {self.page_size})"
            )
        return self._split(target, at).handle

    def delete(self, node: int) -> EvictResult:
        return self._delete(subtree(self._proper_node(node, "delete")))

    def delete_namespace(self, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> EvictResult:
        root = self._roots.get(encode_namespace(extra_key, cache_salt))
        return self._delete(below(root) if root is not None else [])

    def reset(self) -> EvictResult:
        out = Departures(self.page_size)
        for node in self._all_nodes():
            out.page_ids += node.pages or []
            out.host_page_ids += node.host_pages or []
        self._handles.retire_all()
        self._roots.clear()
        self._device_ids.clear()
        self._host_ids.clear()
        self._clock = 0
        if self._events is not None:
            self._events.clear()
            self._emit(Event("cleared", 0, None, None, None))
        return out.result()

    def _delete(self, doomed: list[Node]) -> EvictResult:
        in_use = sum(bool(n.lock_ref or n.host_ref or n.loading or n.pending) for n in doomed)
        if in_use:
            raise LockError(f"{in_use} of {len(doomed)} nodes are locked, host-protected, loading or pending")
        out = Departures(self.page_size)
        for node in reversed(doomed):
            self._remove(node, out)
        return out.result()

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node after its first ``at`` tokens. The handle stays with the lower part; returns the new upper one.

              parent -- [a b c d | 1 2 3 4 | 5 6 7 8] -- children                     before
              parent -- [a b | 1 2 | 5 6] -- [c d | 3 4 | 7 8] -- children            after
                         new handle           old handle, host_ref, pin, job
        """
        parent, pages = node.parent, at // self.page_size
        assert parent is not None
        upper = Node(ROOT, node.namespace, parent, node.tokens[:at])
        self._handles.issue(upper)
        # 1. What is counted along the path, or describes the tokens, holds for both parts.
        upper.lock_ref, upper.pin_ref = node.lock_ref, node.pin_ref
        upper.hit_count, upper.priority = node.hit_count, node.priority
        upper.access_time, upper.created_time = node.access_time, node.created_time
        upper.marks = node.marks
        # 2. The runs are divided.
        upper.pages, node.pages = _divide(node.pages, pages)
        upper.host_pages, node.host_pages = _divide(node.host_pages, pages)
        upper.digests, node.digests = _divide(node.digests, pages)
        node.tokens = node.tokens[at:]
        # 3. A job stays with the handle; the upper part is remembered as belonging to it.
        upper.loading, upper.pending = node.loading, node.pending
        if node.loading or node.pending:
            upper.is_job_part = True
            if not node.is_job_part:
                node.job_pages_above += pages
        # 4. upper takes the node's place.
        parent.children[upper.tokens[: self.page_size]] = upper
        upper.children[node.tokens[: self.page_size]] = node
        node.parent = upper
        return upper

    # ---- entering and leaving a tier (the only places where ids change owner and events arise) -----------------------

    def _enter_device(self, node: Node, ids: list[int]) -> None:
        node.pages = list(ids)
        self._device_ids.update(ids)
        self._emit_stored(node, "device")

    def _enter_host(self, node: Node, ids: list[int]) -> None:
        node.host_pages = list(ids)
        self._host_ids.update(ids)
        self._emit_stored(node, "host")

    def _enter_host_parts(self, parts: list[Node], ids: list[int]) -> None:
        at = 0
        for part in parts:
            pages = len(part.tokens) // self.page_size
            self._enter_host(part, ids[at : at + pages])
            at += pages

    def _leave_device(self, node: Node, out: Departures) -> None:
        assert node.pages is not None
        self._emit_removed(node, "device")
        out.page_ids += node.pages
        self._device_ids.difference_update(node.pages)
        node.pages = None

    def _leave_host(self, node: Node, out: Departures) -> None:
        assert node.host_pages is not None
        self._emit_removed(node, "host")
        out.host_page_ids += node.host_pages
        self._host_ids.difference_update(node.host_pages)
        node.host_pages = None

    def _remove(self, node: Node, out: Departures) -> None:
        """Take a node without children out of the tree, and its namespace with it if it was the last."""
        assert node.parent is not None
        assert not node.children
        self._unpin(node)
        if node.pages is not None:
            self._leave_device(node, out)
        if node.host_pages is not None:
            self._leave_host(node, out)
        del node.parent.children[node.tokens[: self.page_size]]
        self._handles.retire(node)
        if node.parent.is_root and not node.parent.children:
            del self._roots[node.namespace]

    def _remove_subtree(self, node: Node, out: Departures) -> None:
        for doomed in reversed(subtree(node)):
            self._remove(doomed, out)

    # ---- events and hashes -------------------------------------------------------------------------------------------

    def take_events(self, max_events: int | None = None) -> list[Event]:
        queue = self._events if self._events is not None else deque()
        count = len(queue) if max_events is None else min(len(queue), read_int(max_events, "max_events", 0))
        return [queue.popleft() for _ in range(count)]

    def page_keys(self, node: int) -> npt.NDArray[np.uint64]:
        target = self._node(node)
        return np.array(self._digests(target) if target is not None else [], dtype=np.uint64)

    def page_digests(self, node: int) -> npt.NDArray[np.uint8]:
        return self.page_keys(node).astype(">u8").view(np.uint8).reshape(-1, 8)

    def _digests(self, node: Node) -> list[int]:
        missing = list(itertools.takewhile(lambda part: part.digests is None, path_up(node)))
        for part in reversed(missing):
            digest = self._parent_digest(part)
            digest = namespace_digest(part.namespace) if digest is None else digest
            part.digests = []
            for at in range(0, len(part.tokens), self.page_size):
                digest = page_digest(digest, part.tokens[at : at + self.page_size])
                part.digests.append(digest)
        assert node.digests is not None
        return node.digests

    def _parent_digest(self, node: Node) -> int | None:
        """The digest of the page before the node's first one; None at the start of a prefix."""
        assert node.parent is not None
        return None if node.parent.is_root else self._digests(node.parent)[-1]

    def _emit(self, event: Event) -> None:
        assert self._events is not None
        if len(self._events) < self._max_events:
            self._events.append(event)
        else:
            self._dropped_events += 1

    def _emit_stored(self, node: Node, medium: Medium) -> None:
        if self._events is None:
            return
        parent = self._parent_digest(node)
        for page, digest in enumerate(self._digests(node)):
            tokens = node.tokens[page * self.page_size : (page + 1) * self.page_size]
            self._emit(Event("stored", digest, parent, np.array(tokens, dtype=np.int32), medium))
            parent = digest

    def _emit_removed(self, node: Node, medium: Medium) -> None:
        if self._events is None:
            return
        digests = self._digests(node)
        for digest, parent in zip(reversed(digests), [*reversed(digests[:-1]), self._parent_digest(node)], strict=True):
            self._emit(Event("removed", digest, parent, None, medium))

    # ---- inspection --------------------------------------------------------------------------------------------------

    def node_info(self, node: int) -> NodeInfo:
        return self._info(self._proper_node(node, "node_info"))

    def dump(self) -> list[NodeInfo]:
        return [self._info(node) for node in self._all_nodes()]

    def to_dot(self) -> str:
        return render_dot(self.dump())

    def __iter__(self) -> Iterator[int]:
        return iter([node.handle for node in self._all_nodes()])

    def __len__(self) -> int:
        return len(self._handles)

    def stats(self) -> TreeStats:
        """Counted afresh, so that this is what the counters of the fast core are compared with."""
        nodes = list(self._handles.nodes())
        device = [node for node in nodes if node.on_device]
        return TreeStats(
            evictable_tokens=sum(len(node.tokens) for node in device if not node.is_protected),
            protected_tokens=sum(len(node.tokens) for node in device if node.is_protected),
            pending_tokens=sum(len(node.tokens) for node in device if node.pending),
            host_tokens=sum(len(node.tokens) for node in nodes if node.host_pages is not None),
            nodes=len(nodes),
            namespaces=len(self._roots),
            pinned_nodes=sum(node.pin_until is not None for node in nodes),
            memory_bytes=sum(256 + 8 * len(node.tokens) for node in nodes),  # roughly: this is not the tree to weigh
            digest_memory_bytes=sum(8 * len(node.digests) for node in nodes if node.digests is not None),
            queued_events=len(self._events) if self._events is not None else 0,
            dropped_events=self._dropped_events,
            host_evictable_tokens=self._host_evictable_tokens(),
            loading_tokens=sum(len(node.tokens) for node in nodes if node.loading),
        )

    def _host_evictable_tokens(self) -> int:
        """What evict_host could free: host-only nodes, but those that are host-protected and those above such a one."""
        tokens = 0
        held: set[Node] = set()
        for node in reversed([node for root in self._roots.values() for node in below(root)]):
            if node.host_ref or node in held:
                held.add(parent_of(node))
            elif not node.on_device:
                tokens += len(node.tokens)
        return tokens

    def check_integrity(self, capacity: int | None = None, free_page_ids: Tokens | None = None,
                        host_capacity: int | None = None, free_host_page_ids: Tokens | None = None) -> None:
        free = {}
        for tier, count, ids in (("device", capacity, free_page_ids), ("host", host_capacity, free_host_page_ids)):
            limit = None if count is None else read_int(count, f"{tier} capacity", 0)
            if limit is None and ids is not None:
                raise InvalidArgumentError(f"free {tier} page ids without a capacity")
            free[tier] = limit, [] if ids is None else read_tokens(ids, "free page ids").tolist()
        check_tree(self, *free["device"], *free["host"])

    def _all_nodes(self) -> list[Node]:
        """In the order of dump()."""
        return [node for _, root in sorted(self._roots.items()) for node in subtree(root, in_order=True)[1:]]

    def _info(self, node: Node) -> NodeInfo:
        assert node.parent is not None
        return NodeInfo(
            node=node.handle,
            parent=node.parent.handle,
            namespace=node.namespace,
            tokens=np.array(node.tokens, dtype=np.int32),
            path_tokens=path_length(node),
            page_ids=None if node.pages is None else id_array(node.pages),
            host_page_ids=None if node.host_pages is None else id_array(node.host_pages),
            lock_ref=node.lock_ref,
            host_ref=node.host_ref,
            hit_count=node.hit_count,
            priority=node.priority,
            access_time=node.access_time,
            created_time=node.created_time,
            pinned_until_ns=node.pin_until,
            loading=node.loading,
            backup_pending=node.pending,
            marks=node.marks,
        )

    # ---- reading and checking arguments ------------------------------------------------------------------------------

    def _read_key(self, tokens: Tokens) -> Key:
        key = read_tokens(tokens)
        return tuple(key[: len(key) // self.page_size * self.page_size].tolist())

    def _read_ids(self, ids: Tokens, count: int | None = None) -> list[int]:
        pages: list[int] = read_tokens(ids, "page ids").tolist()
        if count is not None and len(pages) != count:
            raise InvalidArgumentError(f"{len(pages)} page ids for {count} pages")
        if pages and min(pages) < 0:
            raise InvalidArgumentError(f"page id {min(pages)} is negative")
        return pages

    def _check_owner(self, ids: list[int], present: Sequence[int | None], owned: set[int], what: str) -> None:
        """Refuse an id that appears twice, or that the tree owns at another place than the one it is given for."""
        seen: set[int] = set()
        for at, page in enumerate(ids):
            if page in seen:
                raise PageOwnershipError(f"{what} id {page} appears twice in one call, again at {at} of {len(ids)}")
            seen.add(page)
            here = present[at] if at < len(present) else None
            if page != here and page in owned:
                raise PageOwnershipError(f"{what} id {page}, at {at} of {len(ids)}, is owned by the tree elsewhere")

    def _own_match(self, match: AnyMatch) -> MatchResult:
        if not isinstance(match, MatchResult):
            raise ArgumentTypeError(f"match must be a MatchResult, not {type(match).__name__}")
        if match.tree_id != self._tree_id:
            raise HandleError(f"the match is of tree {match.tree_id}, not of this one ({self._tree_id})")
        return match

    def _node(self, handle: int) -> Node | None:
        """The node of a handle; None for ROOT, which stands for the roots of all namespaces."""
        try:
            number = operator.index(handle)
        except TypeError:
            raise ArgumentTypeError(f"a node handle must be an int, not {type(handle).__name__}") from None
        return None if number == ROOT else self._handles.find(number)

    def _proper_node(self, handle: int, operation: str) -> Node:
        node = self._node(handle)
        if node is None:
            raise InvalidArgumentError(f"{operation} needs a node, not ROOT")
        return node

    def _require_device(self, node: Node) -> None:
        if not node.on_device:
            raise StateError(f"node {node.handle:#x} is host-only: it has no device pages to protect")


def _nothing_host_protected(node: Node) -> bool:
    return all(child.host_ref == 0 for child in below(node))


def _gone_below(node: Node) -> bool:
    """Whether the backup of everything below the node on the device is pending."""
    return all(child.pending for child in below(node) if child.on_device)


def _divide(run: list[int] | None, at: int) -> tuple[list[int] | None, list[int] | None]:
    return (None, None) if run is None else (run[:at], run[at:])
