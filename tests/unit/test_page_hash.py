"""A page-hash callback of the caller's, through ctypes."""

from __future__ import annotations

import ctypes
import hashlib

import numpy as np
import pytest

from radixkv import ArgumentTypeError, InvalidArgumentError, RadixTree
from radixkv.tree.core import PageHash, page_hash_capsule


class PageRun(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("page_size", ctypes.c_int32),
        ("ns", ctypes.c_void_p),
        ("ns_bytes", ctypes.c_size_t),
        ("parent", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("num_pages", ctypes.c_size_t),
        ("digests", ctypes.c_void_p),
    ]


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(PageRun))


def sha256_chain(run: PageRun) -> bytes:
    """sha256(previous digest + tokens as little-endian 4 bytes), one a page; the namespace comes first of all."""
    digest = ctypes.string_at(run.parent, 32) if run.parent else ctypes.string_at(run.ns, run.ns_bytes or 0)
    page_bytes = 4 * run.page_size
    tokens = ctypes.string_at(run.tokens, run.num_pages * page_bytes)
    digests = []
    for at in range(0, len(tokens), page_bytes):
        digest = hashlib.sha256(digest + tokens[at : at + page_bytes]).digest()
        digests.append(digest)
    return b"".join(digests)


@CALLBACK
def sha256_callback(ctx: int, run: ctypes._Pointer[PageRun]) -> None:
    chain = sha256_chain(run.contents)
    ctypes.memmove(run.contents.digests, chain, len(chain))


ADDRESS = ctypes.cast(sha256_callback, ctypes.c_void_p).value or 0


def test_digests_are_the_callbacks() -> None:
    tree = RadixTree(4, page_hash=page_hash_capsule(ADDRESS, digest_bytes=32))
    tokens = np.arange(40, dtype=np.int32)
    tree.insert(tokens[:24], range_ids(6), cache_salt="tenant")
    node = tree.insert(tokens, range_ids(10), cache_salt="tenant").node  # a second node: chained across the two
    whole = hashlib_chain(tree.node_info(node).namespace, tokens, 4)
    assert tree.page_digests(node).tobytes() == whole[6 * 32 :]
    assert tree.page_keys(node).tolist() == [int.from_bytes(whole[32 * k : 32 * k + 8], "big") for k in range(6, 10)]
    tree.check_integrity()


def test_events_carry_the_callbacks_keys_after_a_split() -> None:
    tree = RadixTree(4, events=True, page_hash=page_hash_capsule(ADDRESS, digest_bytes=32))
    tokens = np.arange(16, dtype=np.int32)
    tree.insert(tokens, range_ids(4))
    tree.match(tokens[:8])
    tree.evict(8)
    whole = hashlib_chain(b"", tokens, 4)
    keys = [int.from_bytes(whole[32 * k : 32 * k + 8], "big") for k in range(4)]
    events = tree.take_events()
    assert [(e.kind, e.key) for e in events] == [
        *(("stored", key) for key in keys),
        ("removed", keys[3]),
        ("removed", keys[2]),
    ]


def test_a_capsule_is_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="NULL"):
        page_hash_capsule(0)
    for size in (0, 7, 65, -1):
        with pytest.raises(InvalidArgumentError, match="digest_bytes"):
            page_hash_capsule(ADDRESS, digest_bytes=size)
    with pytest.raises(ArgumentTypeError):
        page_hash_capsule("x")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError):
        page_hash_capsule(2**70)
    with pytest.raises(ArgumentTypeError):
        PageHash()
    with pytest.raises(ArgumentTypeError):
        RadixTree(4, page_hash=PageHash.__new__(PageHash))
    with pytest.raises(ArgumentTypeError):
        RadixTree(4, page_hash=sha256_callback)  # type: ignore[arg-type]


def range_ids(pages: int) -> list[int]:
    return list(range(pages))


def hashlib_chain(start: bytes, tokens: np.ndarray, page_size: int) -> bytes:
    digest, chain = start, b""
    for at in range(0, len(tokens), page_size):
        digest = hashlib.sha256(digest + tokens[at : at + page_size].astype("<i4").tobytes()).digest()
        chain += digest
    return chain
