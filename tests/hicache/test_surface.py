"""The names that engines touch are there, and do what they say: every public one of the original's, by surface.py."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from radixkv.controller import Controller
from radixkv.hicache import (
    HiCacheStorage,
    HiRadixCache,
    MemoryStateInt,
    RadixCache,
    TokenToKVPoolAllocator,
    TreeNode,
)
from radixkv.storage import MemoryStorage

from .gate import original_or_skip
from .kit import hiradix_cache, radix_cache, settle, take
from .original.install import installed
from .sides import Setup, make_ours
from .surface import CLASSES

KEY = list(range(48))


# ---- the table -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ours() -> Iterator[dict[str, Any]]:
    """One of each of ours, by the original's name."""
    caches = [hiradix_cache(storage=MemoryStorage()), hiradix_cache(kind="mla")]
    cache, mla = caches
    cache.insert(KEY, take(cache, len(KEY)))
    found = cache.match_prefix(KEY)
    operation = cache.prefetch_from_storage("r", cache.root_node, list(range(1000, 1400)))
    pool, allocator, host = cache.kv_cache, cache.token_to_kv_pool_allocator, cache.token_to_kv_pool_host
    yield {
        "BasePrefixCache": radix_cache(), "MatchResult": found, "RadixCache": radix_cache(), "HiRadixCache": cache,
        "TreeNode": found.last_device_node, "HiCacheController": cache.cache_controller,
        "LayerDoneCounter": cache.cache_controller.layer_done_counter, "StorageOperation": operation,
        "PrefetchOperation": operation, "HostKVCache": host, "MHATokenToKVPoolHost": host,
        "MLATokenToKVPoolHost": mla.token_to_kv_pool_host, "MemoryStateInt": MemoryStateInt,
        "HiCacheStorage": HiCacheStorage, "BaseTokenToKVPoolAllocator": allocator,
        "TokenToKVPoolAllocator": TokenToKVPoolAllocator(64, torch.bfloat16, "cpu", pool),
        "PagedTokenToKVPoolAllocator": allocator, "ReqToTokenPool": cache.req_to_token_pool, "KVCache": pool,
        "MHATokenToKVPool": pool, "MLATokenToKVPool": mla.kv_cache,
    }  # fmt: skip
    for one in caches:
        one.close()


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_that_is_kept_is_there(name: str, ours: dict[str, Any]) -> None:
    absent = [attribute for attribute in CLASSES[name].kept.split() if not hasattr(ours[name], attribute)]
    assert not absent, f"{type(ours[name]).__name__} has not {absent}"
    grown = [attribute for attribute in CLASSES[name].left_out if hasattr(ours[name], attribute)]
    assert not grown, f"{type(ours[name]).__name__} has {grown} now: they are kept"


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_has_every_public_name_of_the_original(name: str) -> None:
    found = class_of_original(name)
    kept, left_out = set(CLASSES[name].kept.split()), set(CLASSES[name].left_out)
    assert not kept & left_out
    assert kept | left_out == public_names(found)


@pytest.mark.parametrize("name", CLASSES)
def test_methods_take_what_those_of_the_original_take(name: str, ours: dict[str, Any]) -> None:
    """By place and by name; ours may take more."""
    for method in class_of_original(name).body:
        if isinstance(method, ast.FunctionDef) and method.name in CLASSES[name].kept.split():
            theirs = [argument.arg for argument in method.args.args if argument.arg != "self"]
            found = getattr(ours[name], method.name)
            if callable(found):
                mine = [parameter for parameter in inspect.signature(found).parameters if parameter != "self"]
                assert mine[: len(theirs)] == theirs, f"{name}.{method.name}"


def class_of_original(name: str) -> ast.ClassDef:
    """The source of one class."""
    original_or_skip()
    path = installed() / "sglang" / "srt" / CLASSES[name].file
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise AssertionError(f"no class {name} in {path}")


def public_names(found: ast.ClassDef) -> set[str]:
    """What a class defines, and what its methods set on self."""
    names: set[str] = set()
    for part in found.body:
        if isinstance(part, ast.FunctionDef):
            names.add(part.name)
            names |= {
                node.attr for node in ast.walk(part)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name) and node.value.id == "self"
            }  # fmt: skip
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            names.add(part.target.id)
        elif isinstance(part, ast.Assign):
            names |= {target.id for target in part.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


# ---- what is in flight -----------------------------------------------------------------------------------------------
def test_copies_to_the_host_are_shown_while_they_are_on_their_way() -> None:
    with make_ours(Setup(device_tokens=256, host_ratio=2.0)) as side:
        cache: HiRadixCache = side.cache
        assert not cache.ongoing_write_through
        with side.valve.hold("backup"):
            cache.insert(KEY, side.allocator.alloc(len(KEY)))
            node = cache.match_prefix(KEY).last_device_node
            shown = cache.ongoing_write_through
            assert (len(shown), list(shown), node.id in shown) == (1, [node.id], True)
            assert shown[node.id] == node
            with pytest.raises(KeyError):
                shown[0]
            cache.match_prefix(KEY[:16])  # a split leaves the copy, and the view, with the lower part
            assert shown[node.id].key == KEY[16:]
        settle(cache)
        assert len(shown) == 0
        assert node.id not in shown


def test_loads_are_shown_from_the_moment_that_they_are_queued() -> None:
    with hiradix_cache(load_back_threshold=1) as cache:
        cache.insert(KEY[:16], take(cache, 16))
        slots = take(cache, 48)
        cache.token_to_kv_pool_allocator.free(slots[: cache.insert(KEY, slots)])
        settle(cache)
        cache.evict(32)
        found = cache.match_prefix(KEY)
        assert not cache.ongoing_load_back
        cache.load_back(found.last_host_node)
        assert dict(cache.ongoing_load_back) == {
            found.last_host_node.id: (found.last_device_node, found.last_host_node)
        }
        cache.load_cache_event.set()
        assert not cache.load_cache_event.is_set()
        cache.load_cache_event.clear()
        assert cache.cache_controller.layer_done_counter.producer_index == 1, "setting it has begun the batch"
        settle(cache)
        assert not cache.ongoing_load_back


def test_what_goes_to_storage_and_comes_from_it_is_shown() -> None:
    with make_ours(Setup(device_tokens=256, host_ratio=4.0, storage=True, prefetch_threshold=16)) as side:
        cache: HiRadixCache = side.cache
        controller = cache.cache_controller
        assert (cache.tp_world_size, controller.tp_world_size, cache.prefetch_timeout) == (1, 1, 3.0)
        assert controller.prefetch_threshold == 16
        with side.valve.hold("set"):
            cache.insert(KEY, side.allocator.alloc(len(KEY)))
            cache.writing_check(write_back=True)
            node = cache.match_prefix(KEY).last_device_node
            number = cache.write_backup_storage(node)
            assert dict(cache.ongoing_backup) == {number: node}
        settle(cache)
        assert not cache.ongoing_backup
        hashes = node.hash_value
        cache.reset()
        side.allocator.clear()
        with side.valve.hold("exists"):
            asked = [*KEY, 7, 7]
            operation = cache.prefetch_from_storage("r", cache.root_node, asked)
            assert operation is not None
            assert list(cache.ongoing_prefetch) == ["r"]
            last_node, tokens, slots, again = cache.ongoing_prefetch["r"]
            assert (last_node, tokens, len(slots), again.id) == (cache.root_node, KEY, 0, operation.id)
            assert (operation.token_ids, operation.hash_value, operation.is_done()) == (KEY, [], False)
            assert controller.prefetch_tokens_occupied == len(KEY)
            assert controller.prefetch_rate_limit_check() == (controller.prefetch_capacity_limit > len(KEY))
        side.settle()
        cache.check_hicache_events()  # what storage has is known
        side.settle()
        assert operation.hash_value == hashes
        assert len(operation.host_indices) == operation.completed_tokens == len(KEY)
        cache.check_hicache_events()
        assert operation.is_done()
        assert cache.check_prefetch_progress("r")
        assert (controller.prefetch_tokens_occupied, len(cache.ongoing_prefetch)) == (0, 0)
        assert (operation.hash_value, operation.completed_tokens, operation.is_done()) == ([], 0, True)
        assert cache.match_prefix(KEY).host_hit_length == len(KEY)


def test_a_handle_of_an_old_prefetch_does_not_touch_the_next_of_its_request() -> None:
    with make_ours(Setup(device_tokens=256, host_ratio=4.0, storage=True, prefetch_threshold=16)) as side:
        with side.valve.hold("exists"):
            first = side.cache.prefetch_from_storage("r", side.cache.root_node, KEY)
            first.mark_done()
            assert first.is_done()
            assert side.cache.check_prefetch_progress("r")
            second = side.cache.prefetch_from_storage("r", side.cache.root_node, KEY)
            first.mark_done()
            assert first.id != second.id
            assert first.start_time <= second.start_time
            assert not second.is_done()
        side.settle()


def test_a_reset_leaves_nothing_behind() -> None:
    with make_ours(Setup(device_tokens=256, host_ratio=4.0, storage=True, prefetch_threshold=16)) as side:
        cache: HiRadixCache = side.cache
        with side.valve.hold("exists"):
            cache.insert(KEY, side.allocator.alloc(len(KEY)))
            cache.prefetch_from_storage("r", cache.root_node, [9] * 32)
            cache.reset()
            shown = cache.ongoing_write_through, cache.ongoing_load_back, cache.ongoing_prefetch, cache.ongoing_backup
            assert [len(one) for one in shown] == [0, 0, 0, 0]
        side.settle()


# ---- a scheduler that walks the tree ---------------------------------------------------------------------------------
def dfs_order(root: TreeNode, waiting: dict[str, TreeNode]) -> list[str]:
    """Requests in the order of a walk that goes into the heaviest subtree first, as a scheduler does to keep those with
    a common prefix together: a node weighs as many as wait at it and below it; who waits deeper goes first."""
    at: defaultdict[TreeNode, list[str]] = defaultdict(list)
    for name, node in waiting.items():
        at[node].append(name)
    weight: dict[TreeNode, int] = {}

    def weigh(node: TreeNode) -> int:
        weight[node] = len(at.get(node, ())) + sum(weigh(child) for child in node.children.values())
        return weight[node]

    def visit(node: TreeNode) -> list[str]:
        heaviest = sorted(node.children.values(), key=weight.__getitem__, reverse=True)
        return [name for child in heaviest for name in visit(child)] + at.get(node, [])

    weigh(root)
    return visit(root)


PROMPTS = {
    "a": [1] * 16, "ab": [1] * 16 + [2] * 16, "ab'": [1] * 16 + [2] * 16, "abc": [1] * 16 + [2] * 16 + [3] * 8,
    "ad": [1] * 16 + [4] * 16, "e": [5] * 16, "ef": [5] * 16 + [6] * 8, "nothing": [8] * 16,
}  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("tiers", [1, 2])
def test_dfs_weight_scheduling_walks_the_views(page_size: int, tiers: int) -> None:
    cache: RadixCache = radix_cache(page_size=page_size) if tiers == 1 else hiradix_cache(page_size=page_size)
    for name, prompt in PROMPTS.items():
        if name != "nothing":
            slots = take(cache, len(prompt))
            cache.token_to_kv_pool_allocator.free(slots[: cache.insert(prompt, slots)])
    waiting = {name: cache.match_prefix(rid=name, key=prompt).last_device_node for name, prompt in PROMPTS.items()}
    order = dfs_order(cache.root_node, waiting)
    # a's tree has five requests, and e's two; within a's, that of ab has three and that of ad one
    assert order == ["abc", "ab", "ab'", "ad", "a", "ef", "e", "nothing"]
    deep = waiting["abc"]
    assert [len(node.key) for node in (deep, deep.parent, deep.parent.parent)] == [8, 16, 16]
    assert deep.parent.parent.parent is cache.root_node
    assert deep.parent == waiting["ab"]
    assert deep in deep.parent.children.values()
    if isinstance(cache, HiRadixCache):
        settle(cache)  # a copy locks its node
    cache.inc_lock_ref(deep)
    locks = {name: node.lock_ref for name, node in waiting.items()}
    assert locks == {"a": 1, "ab": 1, "ab'": 1, "abc": 1, "ad": 0, "e": 0, "ef": 0, "nothing": 1}, "the root is locked"
    cache.dec_lock_ref(deep)
    assert waiting["a"].hit_count > waiting["abc"].hit_count >= 1
    if isinstance(cache, HiRadixCache):
        cache.close()


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_cache_of_the_waiting_queue_is_walked_too(page_size: int) -> None:
    """A scheduler's tree without pools, that only remembers who waits for what."""
    cache = RadixCache(None, None, page_size)
    for prompt in PROMPTS.values():
        cache.insert(prompt, torch.empty(len(prompt), dtype=torch.bool))
    waiting = {name: cache.match_prefix(prompt).last_device_node for name, prompt in PROMPTS.items()}
    order = dfs_order(cache.root_node, waiting)
    assert order[:5] == ["abc", "ab", "ab'", "ad", "a"]
    assert order[5:7] == ["ef", "e"]


def test_one_prefetch_of_many_is_found_without_a_look_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler asks for each of its waiting requests."""
    with hiradix_cache(storage=MemoryStorage(), prefetch="wait_complete", prefetch_threshold=4) as cache:
        cache.prefetch_from_storage("r", cache.root_node, list(range(16)))
        monkeypatch.setattr(Controller, "in_flight", lambda _: pytest.fail("looks at all"))
        assert "r" in cache.ongoing_prefetch
        assert cache.ongoing_prefetch["r"][3].request_id == "r"
        assert "other" not in cache.ongoing_prefetch
        with pytest.raises(KeyError):
            _ = cache.ongoing_prefetch["other"]
