"""L2: what a process knows of the folder of the file backend: which value is in which segment, whose turn it is to go.

In memory only: no file is touched here, and no lock is taken; both is the matter of folder.py.

A segment may come *after* a key: without that value its own are of no use (the pages of a prompt after those before
them). It stays as long as one that is there, or being written, comes after one of its keys, and what is there is
closed under "before". Segments that nothing comes after are *leaves*: they go first, the least recently used of them,
as in the tree.

    [system prompt]--[chat 1]--[chat 1, turn 2]        leaves: turn 2 and chat 2; of those the least recently used goes
                  +--[chat 2]

Who has used a segment has come through those before it, so a segment that becomes a leaf counts as used when the one
after it was. Times of use change in place; the heap of leaves holds them as they were, and is put right when a leaf's
turn comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .journal import Line
from .segment import Entry

__all__ = ["Place", "Segment", "View"]


@dataclass(slots=True, eq=False)
class Segment:
    """A published segment, as this process knows it. num_bytes: on disk, whole blocks. after: the key that its values
    come after, "" if none. followers: segments, and reservations, that come after one of its keys. ordered: whether it
    is in the order of leaves. before_ns: of the use before the last one."""

    name: str
    num_bytes: int
    used_ns: int
    disk_ns: int
    after: str = ""
    followers: int = 0
    ordered: bool = False
    keys: list[str] = field(default_factory=list)
    before_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.before_ns = self.used_ns


class Place(NamedTuple):
    """Where a value is."""

    segment: Segment
    entry: Entry


class View:
    """Segments and reservations, values and their copies, followers, order. Not thread-safe: the folder's lock is held.

    Attributes: segments, reserved: by name; places: of values, by key (of one copy); num_bytes: of all segments; lost:
    values that have left, whoever removed them.
    """

    def __init__(self) -> None:
        self.segments: dict[str, Segment] = {}
        self.reserved: dict[str, Line] = {}
        self.places: dict[str, Place] = {}
        self._copies: dict[str, list[Place]] = {}  # of values that two processes have written, beside the one above
        self._followers: dict[str, int] = {}  # by the key that segments and reservations come after
        self._order: list[tuple[int, str]] = []
        self.num_bytes = self.lost = 0

    # ---- what is there -----------------------------------------------------------------------------------------------
    def add(self, segment: Segment, entries: Mapping[str, Entry]) -> None:
        """Take a segment in, if it is not there."""
        if segment.name in self.segments:
            return
        self.segments[segment.name] = segment
        self.num_bytes += segment.num_bytes
        segment.keys = list(entries)
        for key in entries.keys() & self.places.keys():
            self._copies.setdefault(key, []).append(self.places[key])
        self.places.update((key, Place(segment, entry)) for key, entry in entries.items())
        for key in entries.keys() & self._followers.keys():
            segment.followers += self._followers[key]
        if segment.after:
            self.follow(segment.after)
        if not segment.followers:
            self.push(segment)

    def copies_of(self, key: str) -> list[Place]:
        """Everywhere where a value is."""
        place = self.places.get(key)
        return [] if place is None else [place, *self._copies.get(key, ())]

    def follow(self, key: str) -> None:
        """One segment or reservation more comes after a key."""
        self._followers[key] = self._followers.get(key, 0) + 1
        for place in self.copies_of(key):
            place.segment.followers += 1

    def unfollow(self, key: str, used_ns: int = 0) -> None:
        """One less does. Args: used_ns: when that was last used."""
        left = self._followers[key] - 1
        if left:
            self._followers[key] = left
        else:
            del self._followers[key]
        for place in self.copies_of(key):
            segment = place.segment
            segment.followers -= 1
            segment.used_ns = max(segment.used_ns, used_ns)  # who used the one after it went through it
            if not segment.followers:
                self.push(segment)

    def drop(self, name: str) -> int:
        """Without this segment. Returns: its values."""
        segment = self.segments.pop(name, None)
        if segment is None:
            return 0
        self.num_bytes -= segment.num_bytes
        for key in segment.keys:
            if self._copies and key in self._copies:
                self._drop_copy(key, segment)
            elif (place := self.places.get(key)) is not None and place.segment is segment:
                del self.places[key]
                self.lost += 1
        if segment.after:
            self.unfollow(segment.after, segment.used_ns)
        return len(segment.keys)

    def _drop_copy(self, key: str, segment: Segment) -> None:
        left = [place for place in self.copies_of(key) if place.segment is not segment]
        self.places[key] = left[0]
        if len(left) == 1:
            del self._copies[key]
        else:
            self._copies[key] = left[1:]

    def forget(self, key: str) -> None:
        """Without this value. A segment that has no other stays; it may be what others come after no more."""
        places = self.copies_of(key)
        self._copies.pop(key, None)
        for place in places:
            place.segment.keys.remove(key)
            place.segment.followers -= self._followers.get(key, 0)
            if not place.segment.followers:
                self.push(place.segment)
        if places:
            del self.places[key]
            self.lost += 1

    # ---- what is being written ---------------------------------------------------------------------------------------
    def hold(self, line: Line) -> None:
        """Take a reservation in, in the place of one by that name."""
        self.release(line.name)
        self.reserved[line.name] = line
        if line.after:
            self.follow(line.after)

    def release(self, name: str) -> None:
        """Without a reservation."""
        line = self.reserved.pop(name, None)
        if line is not None and line.after:
            self.unfollow(line.after)

    def reserved_bytes(self) -> int:
        """Of all reservations."""
        return sum(line.num_bytes for line in self.reserved.values())

    # ---- whose turn it is --------------------------------------------------------------------------------------------
    def push(self, segment: Segment) -> None:
        """It is a leaf now, and in the order once. There may also be others in it, and segments that have left: each is
        looked at when its turn comes."""
        if segment.ordered:
            return
        segment.ordered = True
        heapq.heappush(self._order, (segment.used_ns, segment.name))
        if len(self._order) > 2 * len(self.segments) + 100:
            for other in self.segments.values():
                other.ordered = not other.followers
            self._order = [(s.used_ns, name) for name, s in self.segments.items() if s.ordered]
            heapq.heapify(self._order)

    def pop_leaf(self) -> Segment | None:
        """The leaf that was used least recently, as far as this process knows; it leaves the order."""
        while self._order:
            used_ns, name = heapq.heappop(self._order)
            segment = self.segments.get(name)
            if segment is None:
                continue
            segment.ordered = False
            if segment.followers:
                continue
            if segment.used_ns == used_ns:
                return segment
            self.push(segment)
        return None

    def oldest_of_a_ring(self) -> Segment | None:
        """Without leaves, someone may have put values that come after each other: the segment used least recently."""
        if any(line.after for line in self.reserved.values()):  # all that is there comes before what is being written
            return None
        if any(not segment.followers for segment in self.segments.values()):  # a leaf that cannot be removed
            return None
        return min(self.segments.values(), key=lambda segment: segment.used_ns, default=None)

    def can_free(self, num_bytes: int) -> bool:
        """Whether so many bytes could go: all but what reservations come after. Mostly the first few leaves do; only
        if all leaves do not, the paths to what is being written are walked."""
        left = num_bytes
        for _, name in self._order:
            segment = self.segments.get(name)
            if segment is None or segment.followers:
                continue
            left -= segment.num_bytes
            if left <= 0:
                return True
        return self.num_bytes - self._bytes_that_stay() >= num_bytes

    def _bytes_that_stay(self) -> int:
        """Of all segments on the paths to reservations."""
        stay: dict[str, int] = {}
        keys = [line.after for line in self.reserved.values() if line.after]
        while keys:
            for segment, _ in self.copies_of(keys.pop()):
                if segment.name not in stay:
                    stay[segment.name] = segment.num_bytes
                    keys += [segment.after] if segment.after else []
        return sum(stay.values())
