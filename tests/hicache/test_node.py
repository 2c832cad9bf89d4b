"""TreeNode: what a view shows, when it is equal to another, and when it is of nobody any more."""

from __future__ import annotations

import pytest

from radixkv.errors import HandleError, LockError, StateError
from radixkv.hicache import RadixCache, TreeNode

from .kit import hiradix_cache, radix_cache, settle, take

KEY = list(range(16))


def put(cache: RadixCache, key: list[int], **more: str) -> None:
    slots = take(cache, len(key))
    cache.token_to_kv_pool_allocator.free(slots[: cache.insert(key, slots, **more)])


def at(cache: RadixCache, key: list[int]) -> TreeNode:
    return cache.match_prefix(key).last_host_node


def test_what_a_view_shows() -> None:
    cache = radix_cache(page_size=4)
    put(cache, KEY)
    put(cache, KEY[:8] + [50] * 8)
    upper, left, right = at(cache, KEY[:8]), at(cache, KEY), at(cache, KEY[:8] + [50] * 8)
    assert (upper.key, left.key, right.key) == (KEY[:8], KEY[8:], [50] * 8)
    assert left.parent == right.parent == upper
    assert upper.parent == cache.root_node
    assert upper.children == {tuple(KEY[8:12]): left, (50,) * 4: right}
    assert cache.root_node.children == {tuple(KEY[:4]): upper}
    assert left.value.tolist() == cache.match_prefix(KEY).device_indices[8:].tolist()
    assert (upper.hit_count, left.hit_count, right.hit_count) == (2, 1, 1)
    assert (left.evicted, left.backuped, left.backuped_storage, left.loading) == (False,) * 4
    assert left.host_value is left.hash_value is left.get_last_hash_value() is None
    assert (left.lock_ref, left.host_ref_counter) == (0, 0)
    cache.inc_lock_ref(left)
    assert (upper.lock_ref, left.lock_ref, right.lock_ref) == (1, 1, 0)


def test_the_root() -> None:
    cache = radix_cache(page_size=4)
    root = cache.root_node
    assert (root.id, root.key, root.value.tolist(), root.parent, root.children) == (0, [], [], None, {})
    assert (root.evicted, root.backuped, root.loading, root.lock_ref, root.hit_count) == (False, False, False, 1, 0)
    assert root.host_value is root.hash_value is root.get_last_hash_value() is None
    assert (root.host_ref_counter, root.last_access_time) == (0, 0)
    root.protect_host()
    root.release_host()
    assert repr(root) == "TreeNode(root)"


def test_children_by_one_token() -> None:
    cache = radix_cache(page_size=1)
    put(cache, [3, 4, 5])
    put(cache, [3, 9])
    (three,) = cache.root_node.children.values()
    assert sorted(three.children) == [4, 9]


def test_children_of_other_namespaces() -> None:
    cache = radix_cache(page_size=4)
    put(cache, KEY)
    put(cache, KEY, extra_key="lora")
    children = cache.root_node.children
    assert len(children) == 2
    assert {type(key[0]) for key in children} == {bytes, int}


def test_children_are_those_of_now() -> None:
    cache = radix_cache(page_size=4)
    put(cache, KEY)
    node = at(cache, KEY)
    assert node.children == {}
    put(cache, [*KEY, 1, 2, 3, 4])
    assert list(node.children) == [(1, 2, 3, 4)]
    cache.match_prefix(KEY[:8])
    assert list(cache.root_node.children.values()) == [at(cache, KEY[:8])]
    cache.evict(4)
    assert node.children == {}
    cache.reset()
    assert cache.root_node.children == {}


def test_the_whole_tree_can_be_walked_from_the_root() -> None:
    """As a scheduler's depth-first order does."""
    cache = radix_cache(4096, page_size=4)
    for branch in range(20):
        put(cache, KEY[: branch % 4 * 4] + [100 + branch] * 8)
    todo, found = [cache.root_node], 0
    while todo:
        node = todo.pop()
        todo += node.children.values()
        found += len(node.key)
        assert all(child.parent == node for child in node.children.values())
    assert found == cache.total_size()


def test_views_are_equal_by_their_node() -> None:
    cache, other = radix_cache(page_size=4), radix_cache(page_size=4)
    for each in (cache, other):
        put(each, KEY)
    one, two = at(cache, KEY), at(cache, KEY)
    assert one == two
    assert hash(one) == hash(two)
    assert one != at(other, KEY)
    assert one != one.id
    assert {one: 1}[two] == 1
    assert cache.root_node == at(cache, [9] * 4)
    assert cache.root_node != other.root_node
    put(cache, [7] * 4)
    assert one < at(cache, [7] * 4), "by their last access"


def test_a_view_stays_with_the_lower_part_of_a_split() -> None:
    cache = radix_cache(page_size=4)
    put(cache, KEY)
    node = at(cache, KEY)
    upper = at(cache, KEY[:8])
    assert node.key == KEY[8:]
    assert node.parent == upper != node
    assert node == at(cache, KEY)
    assert upper.hit_count == node.hit_count == 1


def test_views_of_nodes_that_are_gone() -> None:
    cache = radix_cache(page_size=4)
    put(cache, KEY)
    node = at(cache, KEY)
    cache.evict(16)
    for look in (lambda: node.key, lambda: node.evicted, lambda: node.children, lambda: node.parent, node.protect_host):
        with pytest.raises(HandleError):
            look()
    put(cache, KEY)
    assert node != at(cache, KEY), "a handle is not used again"
    assert "0x" in repr(node)
    cache.reset()
    assert cache.root_node == cache.match_prefix(KEY).last_device_node


def test_host_values_and_references() -> None:
    with hiradix_cache(64, 4, load_back_threshold=1) as cache:
        put(cache, KEY)
        node = at(cache, KEY)
        assert not node.backuped, "not before the copy is complete"
        with pytest.raises(StateError):
            node.protect_host()
        settle(cache)
        assert node.backuped
        assert node.host_value.dtype == node.value.dtype
        assert len(node.host_value) == 16
        node.protect_host()
        node.protect_host()
        assert node.host_ref_counter == 2
        node.release_host()
        node.release_host()
        with pytest.raises(LockError) as caught:
            node.release_host()
        assert isinstance(caught.value, RuntimeError)
        cache.evict(16)
        assert (node.evicted, node.value) == (True, None)
        with pytest.raises(StateError):
            cache.inc_lock_ref(node)


def test_children_are_not_those_of_before_a_backup_that_made_room() -> None:
    cache = hiradix_cache(64, host=0.5, write_through_threshold=2)
    old, new = list(range(32)), list(range(100, 132))
    put(cache, old)
    cache.write_backup(at(cache, old))
    settle(cache)
    cache.evict(64)
    put(cache, new)
    node = at(cache, new)
    assert len(cache.root_node.children) == 2
    cache.inc_hit_count(node)
    (left,) = cache.root_node.children.values()
    assert left.key == new
