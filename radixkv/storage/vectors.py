"""L2: lists of buffers for readv and writev, cut to what one system call should move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["CHUNK_BYTES", "rest", "vectors"]

CHUNK_BYTES = 4 << 20
"""Bytes a system call at most: between two of them the deadline is looked at."""
CHUNK_PARTS = 1024
"""IOV_MAX of Linux."""


def vectors(views: Sequence[memoryview]) -> Iterator[tuple[Sequence[memoryview], int]]:
    """Lists of views, each for one system call, and their bytes. A view longer than a chunk is cut."""
    num_bytes = sum(map(len, views))
    if num_bytes <= CHUNK_BYTES and len(views) <= CHUNK_PARTS:
        if num_bytes:
            yield views, num_bytes
        return
    vector: list[memoryview] = []
    num_bytes = 0
    for view in views:
        for start in range(0, len(view), CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            if vector and (len(vector) == CHUNK_PARTS or num_bytes + len(piece) > CHUNK_BYTES):
                yield vector, num_bytes
                vector, num_bytes = [], 0
            vector.append(piece)
            num_bytes += len(piece)
    if vector:
        yield vector, num_bytes


def rest(vector: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of a vector after ``done`` bytes."""
    for index, view in enumerate(vector):
        if done < len(view):
            return [view[done:], *vector[index + 1 :]]
        done -= len(view)
    return []
