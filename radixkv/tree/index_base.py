"""L1: the contract of the multi-holder index, which prefix is held by whom. Two implementations pass one suite
(tests/oracle): ``reference_index.py``, plain Python and the oracle, and ``prefix_index.pyx``, the fast one.

**Model.** A *page key* is a 64-bit integer that names a page together with everything before it (a chained hash), so
each key has one place: one parent (another key, or none if it starts a prefix), for ever. A *worker* is an integer in
0 .. 2**20 - 1. The index is a forest of *known* pages; each is held by a set of workers. A page is known as long as a
worker holds it or one of its descendants; a known page that nobody holds is a *gap*. Pages that are neither are
forgotten.

**Orphans.** A chain inserted under a parent that is not known is kept: its pages are known and held, but ``find``
does not see them. The moment the parent becomes known, by whichever worker's insert, they join it, with all below
them. Joined pages never become orphans again, since a page with descendants is never forgotten. (If the parent is an
orphan itself, both wait together.)

**Contradictions.** An insert that names a known key under another parent than it has (a root under a parent, too; an
orphan's parent is the one it waits for), names a key twice, or makes a page its own ancestor, raises
InvalidArgumentError and changes nothing: keys are hashes of prefixes, so the caller's chain is wrong, and the index
can't tell which of the two is right. While another thread's insert is under way and then fails, its keys may count as
known.

**Bound.** With ``max_pages`` an insert that makes more pages known than that is followed by evictions, for all
workers alike: leaf pages, those found least recently first. A page counts as found when it is inserted, or found by
``find``. The unit of recency is the run: implementations may take pages that lie in one run for found together, and
evict a run's tail, last page first. A chain longer than the bound keeps its front.

**Failure.** A call that raises changes nothing (InvalidArgumentError, ArgumentTypeError, AllocationError, HandleError).

**Threads.** All methods may be called from any thread at any time; see radixkv.h for what excludes what. Chains that
start with the same page are in one shard: finds in them, and inserts of what the worker holds already, run side by
side, but inserts that change something there go one at a time, and finds wait for them. So if all requests begin with
one system prompt, changes are as fast as one thread is. More than one index, each with the requests that differ in a
page behind the prompt, is the way around it.

``page_keys`` everywhere: one-dimensional; numpy uint64 or int64 (contiguous is fastest), array('Q' or 'q'), any
buffer of such items, or a list or tuple of ints in -2**63 .. 2**64 - 1. Negative ones are the bit patterns of uint64
keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, TypeAlias, overload

__all__ = ["MAX_WORKERS", "IndexStats", "PageKeys", "PathNode", "PrefixIndexBase"]

PageKeys: TypeAlias = Any
"""See the end of the module's docstring."""

MAX_WORKERS = 1 << 20


class PathNode(NamedTuple):
    """A node of a found path: pages ``first_page .. first_page + num_pages`` of the query, which share their holders
    (ascending).

    ``node`` is a handle for get_word and set_word. Runs change shape with other calls: a node's pages as given here
    are a snapshot.
    """

    node: int
    first_page: int
    num_pages: int
    holders: tuple[int, ...]
    word: int


class IndexStats(NamedTuple):
    """pages: known pages, orphan pages and gaps included. entries: (page, holder) pairs. workers: registered ids.
    nodes: runs. memory_bytes: memory in use by the index. evicted_pages: evicted so far because of max_pages."""

    pages: int
    entries: int
    orphan_pages: int
    workers: int
    nodes: int
    memory_bytes: int
    evicted_pages: int


class PrefixIndexBase(ABC):
    """The contract; see the module's docstring for the model."""

    @abstractmethod
    def insert(self, worker: int, page_keys: PageKeys, parent_key: int | None = None) -> int:
        """Record that the worker holds these pages, a chain: each is the child of the one before it, the first of
        parent_key (None: it starts a prefix). Registers the worker, with no keys too (then parent_key means nothing).

        Returns: pages that the worker did not hold before. Raises InvalidArgumentError on a contradiction.
        """

    @abstractmethod
    def remove(self, worker: int, page_keys: PageKeys) -> int:
        """Record that the worker no longer holds exactly these pages, in any order, interior ones too: what it holds
        below them it goes on holding, and it counts again when the gap is filled. Keys that it does not hold are
        skipped (events come twice).

        Returns: pages that it held. All or nothing, even across chains.
        """

    @abstractmethod
    def clear_worker(self, worker: int) -> int:
        """Drop all that the worker holds; its id stays registered. Returns the number of pages; 0 for an unknown id.
        Costs what it held."""

    @abstractmethod
    def remove_worker(self, worker: int) -> int:
        """As clear_worker, and forget the id."""

    @overload
    def find(self, page_keys: PageKeys, nodes: Literal[False] = False) -> dict[int, int]: ...

    @overload
    def find(self, page_keys: PageKeys, nodes: Literal[True]) -> tuple[dict[int, int], list[PathNode]]: ...

    @abstractmethod
    def find(self, page_keys: PageKeys, nodes: bool = False) -> dict[int, int] | tuple[dict[int, int], list[PathNode]]:
        """Tell who holds how much of a prefix.

        Walks from a root along page_keys while each is known as the child of the one before it. A worker's count is
        the number of leading pages that it holds without a gap; workers with 0 are left out.

        Returns: {worker: pages}; with nodes=True a tuple of that and the whole known path, as PathNodes from the root
        down.
        """

    @abstractmethod
    def get_word(self, node: int) -> int:
        """The caller's 64 bits of a node (0 at first). Raises HandleError if the node is gone.

        When a node is split both parts have the word, and the handle stays with the LOWER part (the end of the run).
        When two become one (they can only if their words are equal) the lower one's handle stays. Orphans lose
        nothing: they get handles when they are found.
        """

    @abstractmethod
    def set_word(self, node: int, word: int) -> None:
        """Set it: 0 .. 2**64 - 1 (negative: a bit pattern). Raises HandleError."""

    @abstractmethod
    def workers(self) -> list[int]:
        """Registered worker ids, ascending."""

    @abstractmethod
    def stats(self) -> IndexStats:
        """Counters, as one snapshot."""

    @abstractmethod
    def dump(self) -> dict[int, tuple[int | None, tuple[int, ...]]]:
        """Every known page: {key: (parent key or None, holders ascending)}, as one snapshot. A chain that does not
        lead to None is an orphan."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Verify every invariant from scratch. Raises IntegrityError. O(index)."""
