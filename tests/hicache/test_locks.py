"""Locks beside splits, insertions and evictions: what is locked is what a list of locked prefixes says."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from radixkv.errors import LockError

from .kit import hiradix_cache, radix_cache, settle, take

PAGES = 40


class Model:
    """Every cached prefix of whole pages, and how often each is locked."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.cached: set[tuple[int, ...]] = set()
        self.locks: Counter[tuple[int, ...]] = Counter()

    def prefixes(self, key: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [key[:end] for end in range(self.page_size, len(key) + 1, self.page_size)]

    def protected(self) -> int:
        covered = {prefix for key, count in self.locks.items() if count for prefix in self.prefixes(key)}
        assert covered <= self.cached, "a locked prefix has been evicted"
        return len(covered) * self.page_size

    def total(self) -> int:
        return len(self.cached) * self.page_size

    def hit(self, key: tuple[int, ...]) -> int:
        return max((len(prefix) for prefix in self.prefixes(key) if prefix in self.cached), default=0)


def random_key(rng: random.Random, page_size: int) -> tuple[int, ...]:
    """Few tokens, so that keys share prefixes and split each other at every page."""
    pages = rng.randrange(1, 7)
    return tuple(token for _ in range(pages) for token in [rng.randrange(3)] * page_size)


def check(cache: Any, model: Model) -> None:
    assert cache.total_size() == model.total()
    assert cache.protected_size() == model.protected()
    assert cache.evictable_size() == model.total() - model.protected()


def run(cache: Any, page_size: int, seed: int, steps: int) -> None:
    rng, model = random.Random(seed), Model(page_size)
    allocator = cache.token_to_kv_pool_allocator
    held: list[tuple[Any, tuple[int, ...]]] = []
    for _ in range(steps):
        step, key = (
            rng.choice(["insert", "insert", "match", "lock", "lock", "unlock", "move", "evict"]),
            random_key(rng, page_size),
        )
        before = cache.evictable_size()
        if step == "insert":
            if allocator.available_size() < len(key):
                continue
            slots = allocator.alloc(len(key))
            assert cache.insert(list(key), slots) == model.hit(key)
            allocator.free(slots[: model.hit(key)])
            model.cached.update(model.prefixes(key))
        elif step == "match":
            assert len(cache.match_prefix(list(key)).device_indices) == model.hit(key)
        elif step == "lock":
            hit = key[: model.hit(key)]
            node = cache.match_prefix(list(key)).last_device_node
            delta = cache.inc_lock_ref(node)
            model.locks[hit] += 1
            assert cache.evictable_size() == before + delta <= before
            held.append((node, hit))
        elif step == "unlock" and held:
            node, hit = held.pop(rng.randrange(len(held)))
            delta = cache.dec_lock_ref(node)
            model.locks[hit] -= 1
            assert cache.evictable_size() == before + delta >= before
        elif step == "move" and held:
            # as cache_unfinished_req: a longer path is cached, the lock goes there from its first node
            node, hit = held.pop(rng.randrange(len(held)))
            longer = hit + key
            if allocator.available_size() < len(longer):
                held.append((node, hit))
                continue
            slots = allocator.alloc(len(longer))
            present = cache.insert(list(longer), slots)
            allocator.free(slots[:present])
            model.cached.update(model.prefixes(longer))
            new = cache.match_prefix(list(longer)).last_device_node
            cache.inc_lock_ref(new)
            cache.dec_lock_ref(node)
            model.locks[hit] -= 1
            model.locks[longer] += 1
            held.append((new, longer))
        elif step == "evict":
            free = allocator.available_size()
            freed = cache.evict(rng.randrange(1, 8 * page_size))
            assert allocator.available_size() == free + freed
            model.cached = {
                prefix for prefix in model.cached if len(cache.tree.peek(prefix).page_ids()) * page_size == len(prefix)
            }
        check(cache, model)
    for node, hit in held:
        cache.dec_lock_ref(node)
        model.locks[hit] -= 1
    check(cache, model)
    assert cache.protected_size() == 0
    while cache.evict(10**6):
        pass
    assert allocator.available_size() == allocator.size
    allocator.check_integrity()


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_random_locks(page_size: int, seed: int) -> None:
    run(radix_cache(PAGES * page_size, page_size), page_size, seed, 800)


@pytest.mark.parametrize("seed", range(2))
def test_random_locks_with_a_host_tier(seed: int) -> None:
    """The host tier locks nodes too, while it copies them: settled, nothing of that is left."""

    with hiradix_cache(PAGES * 4, 4, policy="write_back", host=4.0) as cache:
        run(cache, 4, seed, 400)
        settle(cache)
        cache.check_integrity()


def test_write_through_locks_beside_a_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is being written is locked by the copy: a request's lock and unlock, and splits, do not end it."""
    with hiradix_cache(256, 4, evict_awaits_backups=False) as cache:
        key = list(range(32))
        cache.insert(key, take(cache, 32))
        node = cache.match_prefix(key).last_device_node
        assert node.lock_ref == 1
        assert cache.inc_lock_ref(node) == 0
        cache.match_prefix(key[:12])
        assert node.lock_ref == node.parent.lock_ref == 2
        assert cache.dec_lock_ref(node) == 0
        assert cache.evict(100) == 0
        settle(cache)
        assert node.lock_ref == node.parent.lock_ref == 0
        assert node.backuped
        assert node.parent.backuped
        with pytest.raises(LockError):
            cache.dec_lock_ref(node)
        assert cache.evict(100) == 32
        cache.check_integrity()


def test_one_unlock_too_many_during_a_backup_is_an_error_once() -> None:
    """It takes the lock of the copy. The poll that settles this says so; the cache goes on, and can be reset."""
    with hiradix_cache(256, 4) as cache:
        key = list(range(64))
        cache.insert(key, take(cache, 64))
        node = cache.match_prefix(key).last_device_node
        cache.dec_lock_ref(node)
        with pytest.raises(LockError, match="is not locked itself"):
            settle(cache)
        settle(cache)
        assert node.backuped
        cache.check_integrity()
        cache.reset()
        cache.token_to_kv_pool_allocator.clear()
        cache.insert(key, take(cache, 64))
        settle(cache)
        cache.check_integrity()
