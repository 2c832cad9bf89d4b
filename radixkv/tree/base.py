"""L1: the contract of the radix tree. ``reference.py`` states it as plain Python, ``core.pyx`` makes it fast.

Both implementations pass one suite (tests/oracle) and agree on every result, on the shape of the tree and on the order
of eviction. Where the text leaves a choice, the choice that cannot lose a page is taken; these are marked *Decided*.

Vocabulary: a *page* is ``page_size`` tokens and the unit of everything. A *node* is an edge run of whole pages with one
device page id a page or none at all, and one host page id a page or none at all (never neither). A node with device
pages is *on the device*, one without is *host-only*. Nodes on the device are closed under parent. A handle is a 64-bit
integer (index and generation); it names the *end* of its node, so the tokens from the root to that end never change
while the handle is alive: when a node is split the old handle stays with the lower part.

Time is a logical counter: each match, match_extend, insert and insert_host is one tick, and stamps every node of its
path. Other operations neither tick nor stamp.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from ..key import NamespacePart
from ..types import BackupRequest, Event, NextTier, NodeInfo, PageIds, Policy, TreeStats

Tokens: TypeAlias = Any
"""int32/uint32/int64/uint64 numpy arrays (any strides), ``array.array``, any buffer of those item types, torch CPU
tensors of int32/int64, lists and tuples of ints (of anything with ``__index__`` but bool). One-dimensional, native
byte order. Values must fit int32 (negative ids are allowed), those of an ignored tail too.
Raises ArgumentTypeError (float, bool, int8..int16, str, bytes, None, range and other sequences, more than one
dimension, a tensor on a device) or TokenRangeError."""


class MatchResult(Protocol):
    """What a match found, as of the moment it was made: page ids are copied, and later changes do not show."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the hit whose pages are on the device."""

    @property
    def host_num_tokens(self) -> int:
        """Tokens of the hit beyond ``num_tokens``; they are on the host only."""

    @property
    def device_node(self) -> int:
        """Last node of the device part; ROOT if there is none."""

    @property
    def host_node(self) -> int:
        """Last node of the whole hit; equal to device_node if host_num_tokens is 0."""

    @property
    def loading_tokens(self) -> int:
        """Of num_tokens, those whose device pages were still being filled (NodeInfo.loading). Not always the last ones:
        a node may have been inserted below a loading one. A snapshot like the rest: the load may have ended since, or
        failed."""

    def page_ids(self) -> PageIds:
        """A new int32 array of num_tokens // page_size device page ids."""

    def host_page_ids(self) -> PageIds:
        """A new int32 array of host_num_tokens // page_size host page ids (of the part beyond the device)."""


class InsertResult(Protocol):
    """What insert did. ``duplicate_page_ids`` stay with the caller; every other id of the call now belongs to the
    tree."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens whose device pages were in the tree before the call (adopted nodes do not count)."""

    @property
    def node(self) -> int:
        """The node whose path is exactly the (page-aligned) key; ROOT for an empty key."""

    @property
    def duplicate_page_ids(self) -> PageIds:
        """The caller's ids, in key order, at those positions where they differ from the tree's."""

    @property
    def adopted_host_page_ids(self) -> PageIds:
        """The host pages of nodes that were host-only and have taken the caller's device pages: those of the same
        number of pages from prefix_tokens on."""


class InsertHostResult(Protocol):
    """What insert_host did."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens that were in the tree before the call, on either tier."""

    @property
    def node(self) -> int:
        """The node whose path is exactly the key; ROOT for an empty key."""

    @property
    def duplicate_host_page_ids(self) -> PageIds:
        """The caller's ids at positions within prefix_tokens that are not the tree's own host page ids there."""


class EvictResult(Protocol):
    """Pages that left the tree. They belong to the caller now, who returns them to the pools."""

    @property
    def num_tokens(self) -> int:
        """evict, finish_backup, delete, delete_namespace, reset: tokens freed on the device, = page_size *
        len(page_ids).
        evict_host: tokens freed on the host, = page_size * len(host_page_ids)."""

    @property
    def page_ids(self) -> PageIds:
        """Device pages, node by node in the order in which the nodes left; within a node in key order."""

    @property
    def host_page_ids(self) -> PageIds:
        """Host pages, node by node in the order in which they left (within a subtree in any order)."""

    @property
    def to_backup(self) -> list[BackupRequest]:
        """Only from evict(backup=True): nodes to copy to the host, children first; see finish_backup."""


class BaseRadixTree(ABC):
    """A compressed radix tree over page-aligned int32 keys, one root per namespace (extra_key, cache_salt).

    Args:
        page_size: tokens a page, 1 .. 65,536.
        policy: eviction order, smallest first. lru: access. lfu: (hits, access). fifo: created. mru: -access.
            filo: -created. priority: (priority, access). slru: (hits >= 2, access). Ties: the younger node (later
            created) first.
        page_hash: (RadixTree only) None for the chain of page_digests, or a ``page_hash_capsule``.
        events: record a KV event for each page that enters or leaves a tier.
        max_events: bound of the event queue, in events; beyond it events are dropped and counted. A consumer that sees
            ``dropped_events`` grow has a gap: it must drain and discard what is queued, then read ``dump()`` afresh. A
            queued event takes 32 + 4 * page_size bytes, so bound max_events for large pages; a drained queue gives
            large blocks back.

    Memory: what eviction frees inside the tree is kept for later nodes, and given back to the system by ``reset`` (all
    but the slots of nodes) and when the tree is dropped. Page ids cost a bit each, in chunks of 32,768: use dense ids.

    Every method leaves the tree exactly as it was if it raises (no tick either). Handles: an unknown, stale or foreign
    one raises HandleError, as does an int outside 64 bits; what is no int at all, ArgumentTypeError. ROOT: lock,
    unlock, unpin, protect_host and release_host do nothing (0), page_keys, page_digests, path, host_path and due are
    empty, all else raises InvalidArgumentError. Int arguments outside int64 (priority: int32) raise
    InvalidArgumentError, what is no int ArgumentTypeError; a ``match`` that is no match result ArgumentTypeError, too.
    Namespaces: see ``key.encode_namespace``. Counts are in tokens; a tail shorter than a page is ignored in every key.
    """

    page_size: int
    policy: Policy
    events: bool

    # ---- look-up -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def match(self, tokens: Tokens, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> MatchResult:
        """Find the longest cached prefix and stamp its path.

        Splits the node in which the hit ends (on either tier), so that device_node's path is exactly num_tokens long
        and host_node's exactly num_tokens + host_num_tokens. Nothing found, or an unknown namespace: 0 tokens and
        ROOT; nothing is created. Pages that are still being loaded (NodeInfo.loading) count as on the device: wait for
        their load before using them.
        Modifies: access times, and at most two splits.
        """

    @abstractmethod
    def peek(self, tokens: Tokens, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> MatchResult:
        """As match, but read-only: never splits, stamps nothing, ticks nothing.

        *Decided*: device_node (host_node) is the node that holds the last matched token, so its path may be longer than
        the hit; locking it protects at least the hit.
        """

    @abstractmethod
    def peek_many(
        self, keys: Sequence[Tokens], extra_key: NamespacePart = None, cache_salt: NamespacePart = None
    ) -> npt.NDArray[np.int64]:
        """Peek at many keys of one namespace: an int64 array [len(keys), 2] of (num_tokens, host_num_tokens)."""

    @abstractmethod
    def match_extend(self, match: MatchResult, tokens: Tokens) -> MatchResult:
        """Go on from an earlier match: the result is that of match(key + tokens), ``key`` being the whole hit of
        ``match``.

        *Decided*: ``tokens`` are only those *after* the hit (num_tokens + host_num_tokens). The prefix is not compared
        again, and cannot be the wrong one, because host_node names it. Its page ids are read afresh (they may have
        moved between tiers).
        Raises: HandleError if host_node has left the tree since (match again) or ``match`` is of another tree;
            InvalidArgumentError if ``match`` came from peek and ends inside a node.
        """

    # ---- growth ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def insert(
        self,
        tokens: Tokens,
        page_ids: Tokens,
        match: MatchResult | None = None,
        extra_key: NamespacePart = None,
        cache_salt: NamespacePart = None,
        priority: int = 0,
    ) -> InsertResult:
        """Insert a key with its device pages; the tree takes ownership of all ids but the duplicates that it returns.

        Walks the key. On a node with device pages: counted in prefix_tokens, hit_count + 1, ids that differ from the
        tree's are duplicates. On a host-only node: it adopts the caller's ids, keeps its host pages, is not counted,
        its hit_count stays. If the key ends or diverges inside a node the node is split first. The rest becomes one
        new node (hit_count 1). Every node of the path is stamped and its priority raised to at least ``priority``.

        Args:
            page_ids: exactly len(tokens) // page_size non-negative int32 ids, for the whole key, with ``match`` too.
            match: a hint that saves the look-ups. Result and tree are the same as without it (its prefix is verified);
                a stale one costs a full walk.
            priority: int32.
        Raises:
            InvalidArgumentError: a wrong number of ids, a negative id, ``match`` of another namespace or longer than
            the key.
            HandleError: ``match`` of another tree.
            PageOwnershipError: an id that the tree owns at another place (among the duplicates too: freeing one of
                those would free a page in use), or that appears twice in page_ids.
        *Decided*: the equal-id case is judged by position: an id equal to the tree's at the same page is simply that
        page.
        """

    @abstractmethod
    def insert_host(
        self,
        tokens: Tokens,
        host_page_ids: Tokens,
        match: MatchResult | None = None,
        extra_key: NamespacePart = None,
        cache_salt: NamespacePart = None,
        priority: int = 0,
    ) -> InsertHostResult:
        """Insert pages that exist on the host only (prefetched from storage).

        Nodes that exist stay as they are, on either tier (*Decided*: a device node without host copy does not adopt
        one; its ids come back as duplicates). The rest becomes one new host-only node with hit_count 0. Stamps the
        path and raises priorities, as insert does; hit counts do not change. Arguments and errors as for insert.
        """

    # ---- protection --------------------------------------------------------------------------------------------------
    @abstractmethod
    def lock(self, node: int) -> int:
        """Lock the path from ``node`` to the root. Returns the change of evictable_tokens (<= 0). ROOT: 0.

        Raises: StateError if the node is host-only.
        """

    @abstractmethod
    def unlock(self, node: int) -> int:
        """Undo one lock of this very node. Returns the change of evictable_tokens (>= 0).

        *Decided*: unlocking an ancestor of what was locked is an error. It would take the lock of whoever holds the
        descendant, whose own unlock would then fail, so that its pages could never be freed. After a split the locks
        are the lower part's.
        Raises: LockError if each lock of the node is one of a node below (lock_ref - sum of its children's lock_ref is
            0); StateError if host-only.
        """

    @abstractmethod
    def protect_host(self, node: int) -> None:
        """Keep this node's host pages (this node, not the path): host_ref + 1. Raises: StateError without a host
        copy."""

    @abstractmethod
    def release_host(self, node: int) -> None:
        """Undo one protect_host. Raises: LockError if host_ref is 0."""

    @abstractmethod
    def pin(self, node: int, until_ns: int) -> int:
        """Protect the node, and so its path, from eviction until ``expire(now_ns)`` is called with now_ns >= until_ns.

        A second pin replaces the time. A split leaves the pin on the lower part. *Decided*: ``delete``,
        ``reset`` and a failed load override pins.
        Returns: change of evictable_tokens (<= 0). Raises: StateError if host-only; InvalidArgumentError for ROOT or
        until_ns outside int64.
        """

    @abstractmethod
    def unpin(self, node: int) -> int:
        """Remove the pin, if there is one. Returns the change of evictable_tokens (>= 0)."""

    @abstractmethod
    def expire(self, now_ns: int) -> int:
        """Remove every pin whose time has come; the number removed. Costs O(removed x depth)."""

    # ---- eviction and the two tiers ----------------------------------------------------------------------------------
    @abstractmethod
    def evict(self, num_tokens: int, backup: bool = False) -> EvictResult:
        """Free device pages, whole leaves in policy order, until num_tokens are freed. Freeing fewer is an answer.

        Candidate: on the device, not locked, pinned, loading or pending, no child on the device. With a host copy the
        node becomes host-only. Without one it is deleted together with its descendants, all host-only, whose host
        pages are returned; but if a descendant has host_ref > 0 it is no candidate (nor with backup=True: its backup
        could not be dropped). A parent that becomes a candidate joins the order.

        backup=True: a candidate without host copy is marked pending instead of deleted and listed in to_backup. It is
        not counted in num_tokens. *Decided*: it does count towards when to stop (freed + newly pending + held back >=
        num_tokens), else any call would list the whole tree. A node without host
        copy whose device descendants are *all* pending is a candidate too, so a chain is listed children first (also
        one that opens up because the last device node below a pending one left in this very call). *Decided*: a node
        *with* a host copy waits until its pending children have really left, because device-resident nodes are closed
        under parent. What waits for nothing else is held back: such a node, and the nodes with a host copy above it
        for as long as each is an only child on the device. It leaves in a second call, after finish_backup; younger
        nodes need not go in its place. Pending nodes still match and can be locked.

        Raises: InvalidArgumentError if num_tokens < 0.
        """

    @abstractmethod
    def finish_backup(self, node: int, host_page_ids: Tokens | None) -> EvictResult:
        """Settle one entry of to_backup, in the order of the list.

        With ids (one a page of the BackupRequest): the node gets its host copy, and its device pages are freed, unless
        it was locked or pinned meanwhile or has device children (then both stay). None = no room: the node is dropped
        with its host-only descendants, unless it is locked, pinned, has device children, or a descendant has host_ref
        > 0 (then it stays as it was before). If the node was split meanwhile the parts are settled together, the lower
        first, each by these rules; ids are in key order of the original node; call it with the handle from the
        BackupRequest.

        Raises: StateError if not pending (or only the split-off upper part of a pending node); InvalidArgumentError
        for a wrong number of ids or a negative one; PageOwnershipError as insert.
        """

    @abstractmethod
    def evict_host(self, num_tokens: int) -> EvictResult:
        """Free host pages of host-only leaves (no children, host_ref 0) in policy order until num_tokens are freed;
        they leave the tree.

        Host copies of nodes that are on the device too are no candidates.
        """

    @abstractmethod
    def set_host(self, node: int, host_page_ids: Tokens) -> None:
        """Record a finished write-through: the last len(host_page_ids) pages of the node's path now have a host copy.

        More ids than the node has pages cover ancestors too (the node was split while the copy ran); the range must
        end at a node boundary. Raises: InvalidArgumentError if it does not, or is empty, for ROOT, or a negative id;
        StateError if a covered node has a host copy already, is host-only, or pending; PageOwnershipError as insert.
        """

    @abstractmethod
    def set_device(self, node: int, page_ids: Tokens, loading: bool = False) -> None:
        """Load back: give a host-only node device pages (one id a page of the node). Its parent must be on the device.

        loading=True: the copy is still in flight. Until finish_load the node and its path count as protected. The
        "stored" event is recorded now, as others may match the node from now on; a failed load records "removed".
        Raises: StateError if on the device already or the parent is host-only; InvalidArgumentError for a wrong number
        of ids or a negative one; PageOwnershipError as insert.
        """

    @abstractmethod
    def finish_load(self, node: int, success: bool = True) -> EvictResult:
        """End a load begun with set_device(loading=True); call it with that handle, splits since then included.

        success=False: the node, and what was split from it, is host-only again and its device pages are returned, the
        lower part's first; pins on it are removed.
        Raises: StateError if not loading (or only the split-off upper part); LockError on failure if a part is locked
        or has other children
        on the device: somebody uses pages that never arrived.
        """

    # ---- what a controller keeps on the tree, and asks of it ---------------------------------------------------------
    @abstractmethod
    def mark(self, node: int, set: int = 0, clear: int = 0, num_pages: int | None = None) -> None:
        """Set and clear marks: a byte a node that is the caller's (a bit mask; to the tree its bits mean nothing).

        A new node has none. A split copies them to both parts. Nothing but mark ever changes them: not eviction,
        adoption, load or backup. They go with the node when it leaves the tree.

        Args:
            num_pages: None for this node alone; else for the nodes that hold the last num_pages pages of the node's
                path (the node was split while what the mark tells of was under way). Must begin at a node boundary.
        Raises: InvalidArgumentError for ROOT, a mask outside 0..255, a bit in both masks, or a num_pages that is less
            than 1, longer than the path, or begins inside a node.
        """

    def begin_write(self, node: int, marks: int) -> PageIds | None:
        """Begin a copy of a node to the host, in one step: unless it has one of these marks, a host copy or one that is
        asked for, or its device pages are not there (yet), lock its path and set the marks.

        Returns: its device pages, a new int32 array; None, and nothing has changed, otherwise.
        Raises: InvalidArgumentError for ROOT or a mask outside 0..255.
        """
        if not 0 <= marks <= 255:
            raise InvalidArgumentError(f"begin_write: marks {marks:#x} are not in 0..255")
        info = self.node_info(node)
        if info.page_ids is None or info.host_page_ids is not None or info.loading or info.backup_pending:
            return None
        if info.marks & marks:
            return None
        self.mark(node, set=marks)
        self.lock(node)
        return info.page_ids

    def begin_writes(self, node: int, min_hits: int, marks: int) -> list[tuple[int, PageIds]]:
        """``begin_write`` of all that is ``due`` for the host along a path, root side first, in one step.

        Returns: each node with its device pages. Raises: as ``due`` and ``begin_write``.
        """
        begun = [(part, self.begin_write(part, marks)) for part in self.due(node, "host", min_hits, marks)]
        return [(part, pages) for part, pages in begun if pages is not None]

    def host_pages(self, node: int) -> tuple[int, PageIds | None]:
        """A node's parent (ROOT for the first of a path), and its host pages, a new int32 array; None: it has none.

        What node_info says, for a fraction of its time. Raises: InvalidArgumentError for ROOT.
        """
        info = self.node_info(node)
        return info.parent, info.host_page_ids

    @abstractmethod
    def due(self, node: int, tier: NextTier, min_hits: int, without_marks: int = 0) -> list[int]:
        """The nodes of the path root -> node that lack their copy in the next tier, root side first.

        tier="host": on the device, not loading, no host copy, not pending. tier="storage": with a host copy (the tree
        does not know what is in storage: the caller's marks tell). Both: hit_count >= min_hits, and none of the bits of
        ``without_marks`` among the node's marks. One walk up the path; what is between two nodes that are due need not
        be due. ROOT: [].
        Raises: InvalidArgumentError for another tier, a negative min_hits, or a mask outside 0..255.
        """

    @abstractmethod
    def path(self, node: int) -> list[int]:
        """The nodes of the path root -> node, root side first, ``node`` last. ROOT: []."""

    @abstractmethod
    def host_path(self, node: int) -> list[int]:
        """The host-only tail of the path root -> node, root side first: what a load must bring back for ``node``, each
        one's parent before it. [] if the node is on the device, and for ROOT."""

    # ---- structure ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def split_at(self, node: int, num_tokens: int) -> int:
        """Split a node so that its first num_tokens become a new upper node; returns the upper one. The handle stays
        with the rest.

        The upper node copies lock_ref, hit_count, priority, times, marks, loading and pending; host_ref and the pin
        stay below.
        Raises: InvalidArgumentError unless 0 < num_tokens < the node's own tokens and a multiple of page_size.
        """

    @abstractmethod
    def delete(self, node: int) -> EvictResult:
        """Delete a node with its whole subtree; returns the pages of both tiers.

        Raises: LockError, naming how many, if a node of the subtree is locked, host-protected, loading or pending;
        InvalidArgumentError for ROOT.
        """

    @abstractmethod
    def delete_namespace(self, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> EvictResult:
        """Delete every node of a namespace, as delete does. An unknown namespace: an empty result."""

    @abstractmethod
    def reset(self) -> EvictResult:
        """Drop everything, locked or not; returns the pages of both tiers. Every handle becomes stale.
        The clock restarts; dropped_events goes on, so that a consumer can tell.

        *Decided*: an in-flight backup's device pages are among the returned ones; its finish_backup then raises
        HandleError and the host pages of that call stay with the caller. Queued events are dropped (and not counted),
        one "cleared" is queued.
        """

    # ---- events, hashes, inspection ----------------------------------------------------------------------------------
    @abstractmethod
    def take_events(self, max_events: int | None = None) -> list[Event]:
        """Drain the queue, oldest first. Raises: InvalidArgumentError if max_events < 0.

        Order within an operation: parents are stored before children, children removed before parents (so within a node
        stored in key order, removed in reverse). What is stored comes before what is removed; a node that leaves both
        tiers leaves the device first. "removed" has its parent_key, too; "cleared" has key 0.
        """

    @abstractmethod
    def page_keys(self, node: int) -> npt.NDArray[np.uint64]:
        """The keys of the node's own pages: the first 8 bytes, big-endian, of each page's digest. ROOT: empty."""

    @abstractmethod
    def page_digests(self, node: int) -> npt.NDArray[np.uint8]:
        """The chained digests of the node's own pages, uint8 [pages, digest_bytes]. The default is a 64-bit chain, for
        look-up only:

        mix(x) = three rounds x ^= x >> 32, with x *= 0xd6e8feb86659fd93 between them (mod 2**64).
        Seed: h = 0x9e3779b97f4a7c15; for each byte of the namespace encoding h = (h ^ byte) * 0x100000001b3; mix(h).
        Page: h = parent; for each pair of tokens (low, high as uint32; the last high is 0 if page_size is odd)
        h = (h ^ (low | high << 32)) * 0x9fb21c651e98df25, h ^= h >> 29; mix(h). Stored big-endian.
        """

    @abstractmethod
    def node_info(self, node: int) -> NodeInfo:
        """A snapshot of one node. Raises: InvalidArgumentError for ROOT."""

    @abstractmethod
    def dump(self) -> list[NodeInfo]:
        """Every node, depth first, parents first, siblings ordered by their tokens (as tuples), namespaces by their
        encoding. For people and tests."""

    @abstractmethod
    def to_dot(self) -> str:
        """The tree as a Graphviz digraph: one box a node with tokens, tiers, locks and hits."""

    @abstractmethod
    def __iter__(self) -> Iterator[int]:
        """Handles of all nodes, in the order of dump()."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of nodes, roots excluded."""

    @abstractmethod
    def stats(self) -> TreeStats:
        """Counters; see TreeStats."""

    @abstractmethod
    def check_integrity(self, capacity: int | None = None, free_page_ids: Tokens | None = None,
                        host_capacity: int | None = None, free_host_page_ids: Tokens | None = None) -> None:
        """Verify every invariant from scratch, O(tree): structure, counters, lock and pin counts, candidate order,
        page id uniqueness.

        With a capacity (in pages) and the free page ids of that tier: also that tree and free ids are disjoint and that
        tree + free = capacity (pass what is in flight as free). Raises: IntegrityError naming the first broken
        invariant; InvalidArgumentError for free ids without a capacity.
        """
