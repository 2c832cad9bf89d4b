"""The SHA-256 chain over pages: native, by hashlib, and in a tree, against hashlib alone."""

from __future__ import annotations

import array
import gc
import hashlib
import struct
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from radixkv import ArgumentTypeError, InvalidArgumentError, RadixTree, TokenRangeError
from radixkv.key import encode_namespace
from radixkv.tree import page_hash
from radixkv.tree.page_hash import DIGEST_BYTES, namespace_digest, sha256_chain, sha256_page_hash, sha256_provider


def expected(tokens: list[int], page_size: int, previous: bytes = b"") -> list[bytes]:
    """Written from the definition alone: one hashlib object a page, one struct.pack a token."""
    digests = []
    for at in range(0, len(tokens) // page_size * page_size, page_size):
        page = hashlib.sha256(previous)
        for token in tokens[at : at + page_size]:
            page.update(struct.pack("<i", token))
        digests.append(previous := page.digest())
    return digests


def start_of(namespace: bytes) -> bytes:
    """What stands before the first page; the formula of the documentation."""
    return hashlib.sha256(hashlib.sha256(namespace).digest() + b"n").digest() if namespace else b""


def rows(chain: np.ndarray) -> list[bytes]:
    assert chain.dtype == np.uint8
    assert chain.shape[1:] == (DIGEST_BYTES,)
    return [row.tobytes() for row in chain]


@pytest.fixture(params=["native", "hashlib"])
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way of hashing; the one of this machine comes back afterwards."""
    usual = sha256_provider()
    if request.param == "hashlib":
        assert page_hash._choose([]) == "hashlib"
    elif usual == "hashlib":
        pytest.skip("this Python has no libcrypto")
    yield request.param
    assert page_hash._choose(page_hash._candidates()) == usual


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 16, 64, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 64, 1000, 5003])
def test_chain(provider: str, page_size: int, num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens * 1000 + page_size)
    tokens = rng.integers(-(2**31), 2**31, num_tokens).tolist()
    assert rows(sha256_chain(tokens, page_size)) == expected(tokens, page_size)


def test_the_definition_by_hand(provider: str) -> None:
    first = hashlib.sha256(b"\x01\x00\x00\x00\xff\xff\xff\xff").digest()
    second = hashlib.sha256(first + b"\x00\x00\x00\x80\xff\xff\xff\x7f").digest()
    assert rows(sha256_chain([1, -1, -(2**31), 2**31 - 1], 2)) == [first, second]


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_a_chain_goes_on_from_a_digest(provider: str, page_size: int) -> None:
    tokens = list(range(-20, 140))
    whole = sha256_chain(tokens, page_size)
    for pages in range(0, len(whole) + 1, 3):
        previous = whole[pages - 1].tobytes() if pages else None
        rest = sha256_chain(tokens[pages * page_size :], page_size, previous)
        assert rows(rest) == rows(whole[pages:])
        assert rows(sha256_chain(tokens[pages * page_size :], page_size, previous=previous)) == rows(rest)


def test_any_kind_of_tokens(provider: str) -> None:
    values = list(range(96))
    wanted = expected(values, 16)
    wide = np.zeros((96, 2), np.int64)
    wide[:, 0] = values
    for tokens in (values, tuple(values), np.array(values, np.int32), np.array(values, np.uint64), wide[:, 0],
                   array.array("i", values), memoryview(np.array(values, np.uint32))):  # fmt: skip
        assert rows(sha256_chain(tokens, 16)) == wanted


def test_bad_arguments(provider: str) -> None:
    for page_size in (0, -1, 65_537, 2**70):
        with pytest.raises(InvalidArgumentError, match="page_size"):
            sha256_chain([1, 2], page_size)
    for previous in (b"", b"x" * 31, b"x" * 33):
        with pytest.raises(InvalidArgumentError, match=f"{len(previous)} bytes"):
            sha256_chain([1, 2], 1, previous)
    for wrong in ("x" * 32, bytearray(32), np.zeros(32, np.uint8), 7):
        with pytest.raises(ArgumentTypeError, match="previous"):
            sha256_chain([1, 2], 1, wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError):
        sha256_chain("text", 1)
    with pytest.raises(ArgumentTypeError):
        sha256_chain([1, 2], 1.5)  # type: ignore[arg-type]
    with pytest.raises(TokenRangeError):
        sha256_chain([2**31], 1)


def test_a_result_is_the_callers(provider: str) -> None:
    chain = sha256_chain([1, 2, 3], 1)
    chain[:] = 0
    assert rows(sha256_chain([1, 2, 3], 1)) == expected([1, 2, 3], 1)


def test_the_provider_is_hashlibs_own_library() -> None:
    import _hashlib

    assert hasattr(_hashlib, "openssl_md_meth_names")
    ssl = pytest.importorskip("ssl", reason="this Python has no OpenSSL")
    assert sha256_provider() == ssl.OPENSSL_VERSION


def test_a_library_that_lacks_or_is_wrong_is_passed_over() -> None:
    usual = sha256_provider()
    try:
        assert page_hash._choose(["no-such-library.so", "libm.so.6"]) == "hashlib"
        assert page_hash._choose(["libm.so.6", *page_hash._candidates()]) == usual
    finally:
        page_hash._choose(page_hash._candidates())


def test_threads_hash_at_the_same_time() -> None:
    """Long chains give the GIL up: another thread runs while one hashes."""
    if sha256_provider() == "hashlib":
        pytest.skip("hashlib's chain holds the GIL")
    tokens = np.arange(2_000_000, dtype=np.int32)
    wanted = sha256_chain(tokens, 16)[-1].tobytes()
    running, others = threading.Event(), []

    def hash_it() -> None:
        running.set()
        others.append(sha256_chain(tokens, 16)[-1].tobytes())
        running.clear()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to give the GIL up: only who offers it
    try:
        thread = threading.Thread(target=hash_it)
        thread.start()
        running.wait()
        progress = 0
        while running.is_set() and progress < 100:
            progress += 1
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert progress > 0
    assert others == [wanted]


# ----------------------------------------------------------------------------------------------------------- in a tree


@pytest.mark.parametrize("page_size", [1, 16, 7])
def test_digests_along_a_path_with_splits_and_in_two_namespaces(provider: str, page_size: int) -> None:
    tokens = np.arange(-5, 12 * page_size - 5, dtype=np.int32)
    tree = RadixTree(page_size, page_hash=sha256_page_hash())
    for at, namespace in enumerate(({}, {"extra_key": "lora", "cache_salt": "tenant"})):
        digests = expected(tokens.tolist(), page_size, start_of(encode_namespace(**namespace)))
        ids = np.arange(at * 100, at * 100 + 12, dtype=np.int32)
        tree.insert(tokens[: 8 * page_size], ids[:8], **namespace)
        if at == 0:
            node = tree.match(tokens, **namespace).device_node
            assert rows(tree.page_digests(node)) == digests[:8]  # hashed, then split
        tree.match(tokens[: 3 * page_size], **namespace)
        end = tree.insert(tokens, ids, **namespace).node
        path = tree.path(end)
        assert len(path) == 3
        assert [row for node in path for row in rows(tree.page_digests(node))] == digests
        keys = [int(key) for node in path for key in tree.page_keys(node)]
        assert keys == [int.from_bytes(digest[:8], "big") for digest in digests]
    assert tree.stats().namespaces == 2
    assert set(digests).isdisjoint(expected(tokens.tolist(), page_size)), "no page of a tenant is everybody's"
    other = tree.insert(np.append(tokens[: 3 * page_size], tokens[:page_size] + 1).astype(np.int32), [0, 1, 2, 50]).node
    changed = expected([*tokens[: 3 * page_size].tolist(), *(tokens[:page_size] + 1).tolist()], page_size)
    assert rows(tree.page_digests(other)) == changed[3:]
    tree.check_integrity()


def test_no_tokens_look_like_a_namespace(provider: str) -> None:
    """A prompt whose first page spells a tenant's name does not go on like a prompt of that tenant."""
    name = encode_namespace(cache_salt="x" * 22)
    assert len(name) % 4 == 0
    spelt = np.frombuffer(name, "<i4")
    for chosen in (spelt, np.frombuffer(hashlib.sha256(name).digest(), "<i4")):
        size = len(chosen)
        page = np.arange(size, dtype=np.int32)
        after = sha256_chain(np.concatenate([chosen, page]), size)[1].tobytes()
        assert after != sha256_chain(page, size, namespace_digest(name))[0].tobytes()


def test_the_digest_of_a_namespace() -> None:
    assert namespace_digest(b"") is None
    name = encode_namespace("lora", None)
    assert namespace_digest(name) == hashlib.sha256(hashlib.sha256(name).digest() + b"n").digest() == start_of(name)
    with pytest.raises(ArgumentTypeError, match="str"):
        namespace_digest("lora")  # type: ignore[arg-type]


def test_events_carry_the_first_eight_bytes(provider: str) -> None:
    tree = RadixTree(4, events=True, page_hash=sha256_page_hash())
    tree.insert(list(range(12)), [0, 1, 2])
    keys = [int.from_bytes(digest[:8], "big") for digest in expected(list(range(12)), 4)]
    events = tree.take_events()
    assert [event.key for event in events] == keys
    assert [event.parent_key for event in events] == [None, *keys[:-1]]


def test_the_hash_lives_as_long_as_its_tree(provider: str) -> None:
    trees = [RadixTree(2, page_hash=sha256_page_hash()) for _ in range(20)]
    gc.collect()
    for tree in trees:
        node = tree.insert([1, 2, 3, 4], [0, 1]).node
        assert rows(tree.page_digests(node)) == expected([1, 2, 3, 4], 2)


def test_one_hash_serves_trees_of_several_threads(provider: str) -> None:
    shared = sha256_page_hash()
    tokens = np.arange(4096, dtype=np.int32)
    wanted = expected(tokens.tolist(), 16)
    found: list[list[bytes]] = []

    def grow() -> None:
        tree = RadixTree(16, page_hash=shared)
        node = tree.insert(tokens, np.arange(256, dtype=np.int32)).node
        found.append(rows(tree.page_digests(node)))

    threads = [threading.Thread(target=grow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4


def test_a_hash_made_before_keeps_its_library() -> None:
    """Choosing hashlib later does not pull the library from under a tree that uses it."""
    tree = RadixTree(2, page_hash=sha256_page_hash())
    try:
        page_hash._choose([])
        gc.collect()
        node = tree.insert([1, 2, 3, 4], [0, 1]).node
        assert rows(tree.page_digests(node)) == expected([1, 2, 3, 4], 2)
    finally:
        page_hash._choose(page_hash._candidates())


def test_many_threads_ask_one_tree_that_hashes_in_python() -> None:
    """The fallback takes the GIL under the tree's lock: nobody may wait for that lock with the GIL in hand."""
    try:
        page_hash._choose([])
        tree = RadixTree(1, page_hash=sha256_page_hash())
    finally:
        page_hash._choose(page_hash._candidates())
    nodes = [tree.insert([first, *range(50)], list(range(first * 51, first * 51 + 51))).node for first in range(8)]

    def ask(mine: list[int]) -> None:
        for _ in range(20):
            for node in mine:
                tree.page_keys(node)
                tree.lock(node)
                tree.mark(node, set=1)
                tree.due(node, "host", 0)
                tree.unlock(node)

    threads = [threading.Thread(target=ask, args=(nodes[at::2],)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
