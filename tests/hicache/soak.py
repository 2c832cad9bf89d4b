"""Drives HiRadixCache at random on real files and checks every byte: python -m tests.hicache.soak --steps N --seed S

The machine, the folder and the ends of processes are those of tests/controller (soak_machine.py has what differs); what
runs on them is a scheduler's life of requests: match, load back, chunks, tokens, retraction, an end anywhere; on real
pools of both kinds, in all layouts, next to evictions, resets, storage that is detached, and calls of every method on
nodes chosen at random.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from radixkv.errors import LoadError
from radixkv.key import encode_namespace
from radixkv.storage.file import FileStorage
from radixkv.types import ROOT
from tests.controller.disk import Disk
from tests.controller.soak import Unreliable

from .soak_machine import LAYERS, CacheMachine, content_of, free_pages

NONE = np.zeros(0, np.int64)


@dataclass(eq=False)
class Req:
    """What a scheduler knows of a request. ``all_ids``: with the tokens that it will put out; ``rows``: their KV."""

    rid: str
    all_ids: list[int]
    prompt: int
    extra_key: str | None
    cache_salt: str | None
    rows: Any
    step: str = "submit"
    chunk: int = 1 << 30
    output_ids: list[int] = field(default_factory=list)
    fill_ids: list[int] = field(default_factory=list)
    req_pool_idx: int | None = None
    prefix_indices: Any = ()
    last_node: Any = None
    consumer: int = 0
    target: int = 0
    """Tokens to compute before the first, or the next, is put out."""
    held: int = 0
    """Tokens that have slots in its row."""

    @property
    def origin_input_ids(self) -> list[int]:
        return self.all_ids[: self.prompt]

    @property
    def namespace(self) -> dict[str, str | None]:
        return {"extra_key": self.extra_key, "cache_salt": self.cache_salt}


class CacheSoak(CacheMachine):
    """One run; see CacheMachine."""

    # ---- requests ----------------------------------------------------------------------------------------------------
    def prompt(self) -> list[int]:
        parts = self.random.integers(0, len(self.segments), int(self.random.integers(1, 6)))
        return [token for part in parts for token in self.segments[part]]

    def content(self, tokens: list[int], extra_key: str | None, cache_salt: str | None) -> np.ndarray[Any, Any]:
        namespace = self.model.encode() + b"/" + encode_namespace(extra_key, cache_salt)
        return content_of(tokens, namespace, len(self.kv))

    def new_request(self) -> None:
        if len(self.requests) >= 5:
            return
        self.requests_made += 1
        prompt, extra, salt = self.prompt(), [None, None, None, "lora"][self.random.integers(4)], None
        if self.chance(0.2):
            salt = "salt"
        ids = prompt + self.random.integers(0, 50, int(self.random.integers(1, 7))).tolist()
        request = Req(f"r{self.requests_made}", ids, len(prompt), extra, salt, self.content(ids, extra, salt))
        if self.chance(0.3):
            request.chunk = int(self.random.integers(1, 12))
        self.requests.append(request)

    def step_request(self) -> None:
        if self.requests:
            request = self.requests[int(self.random.integers(len(self.requests)))]
            if self.chance(0.01):
                self.abort(request)
            else:
                getattr(self, f"do_{request.step}")(request)

    def row(self, request: Req) -> Any:
        return self.rows.req_to_token[request.req_pool_idx]

    def slots(self, indices: Any) -> np.ndarray[Any, Any]:
        given = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices, np.int64)
        return given.astype(np.int64)

    def verify(self, request: Req, indices: Any, layer: int | None = None) -> None:
        """These slots hold the KV of the first tokens: every byte."""
        slots = self.slots(indices)
        for at in range(LAYERS) if layer is None else (layer,):
            wanted = request.rows[at * self.kv.halves : (at + 1) * self.kv.halves, : len(slots)]
            if not np.array_equal(self.kv.read(slots, at), wanted):
                raise AssertionError(f"wrong bytes in layer {at} are served to {request.rid} in step {request.step}")
        self.served_tokens += len(slots)

    def do_submit(self, request: Req) -> None:
        request.step = "admit"
        if not self.cache.enable_storage or self.chance(0.2):
            return
        ids = request.all_ids[: request.prompt + len(request.output_ids)]
        found = self.cache.match_prefix(ids[:-1], **request.namespace)
        known = len(found.device_indices) + found.host_hit_length
        begun = self.cache.prefetch_from_storage(
            request.rid, found.last_host_node, ids[known:], found.last_host_node.get_last_hash_value(),
            **request.namespace,
        )  # fmt: skip
        if begun is not None:
            request.step = "wait_prefetch"
            assert begun.completed_tokens >= 0

    def do_wait_prefetch(self, request: Req) -> None:
        if self.chance(0.02):
            self.cache.cancel_prefetch(request.rid)
            request.step = "admit"
        elif self.chance(0.25) and self.cache.check_prefetch_progress(request.rid):
            request.step = "admit"

    def do_admit(self, request: Req) -> None:
        """Lock, load what is on the host, lock where that ends."""
        row = self.rows.alloc(1)
        if row is None:
            return
        request.req_pool_idx = row[0]
        ids = request.all_ids[: request.prompt + len(request.output_ids)]
        found = self.cache.match_prefix(ids[: len(ids) - 1], **request.namespace)
        self.cache.inc_lock_ref(found.last_device_node)
        loaded, node = NONE, found.last_device_node
        if found.host_hit_length:
            quota = int(self.random.integers(0, 60)) if self.chance(0.3) else None
            loaded, node = self.cache.init_load_back(found.last_host_node, found.host_hit_length, quota)
        self.cache.inc_lock_ref(node)
        self.cache.dec_lock_ref(found.last_device_node)
        self.cache.attribute(request.rid, len(ids), found, len(loaded))
        request.last_node = node
        request.prefix_indices = torch.cat([found.device_indices, torch.as_tensor(loaded, device=self.device)])
        request.held = len(request.prefix_indices)
        self.rows.write((request.req_pool_idx, slice(0, request.held)), request.prefix_indices.to(torch.int32))
        request.target = len(ids)
        request.fill_ids = ids[: min(len(ids), request.held + request.chunk)]
        request.step = "extend"

    def do_extend(self, request: Req) -> None:
        """A batch begins: its loads, and slots for what it computes."""
        request.consumer = self.cache.ready_to_load_host_cache()
        if not self.extend(request, len(request.fill_ids)):
            self.done["no room"] += 1
            self.retract(request)
            return
        request.step = "forward"

    def extend(self, request: Req, after: int) -> bool:
        """Slots up to a token. Returns: whether there was room."""
        before, need = request.held, after - request.held + self.page_size
        if self.allocator.available_size() < need:
            self.cache.evict(need)
        last = int(self.row(request)[before - 1]) if before else -1
        many = [torch.tensor([n], device=self.device) for n in (before, after, last)]
        if after == before + 1 and before:
            slots = self.allocator.alloc_decode(many[1], many[2])
        else:
            slots = self.allocator.alloc_extend(*many, after - before)
        if slots is None:
            return False
        self.rows.write((request.req_pool_idx, slice(before, after)), slots.to(torch.int32))
        request.held = after
        return True

    def do_forward(self, request: Req) -> None:
        """The model reads layer by layer what is there, then writes what is new."""
        known = len(request.prefix_indices)
        if not self.wait_and_verify(request, known):
            return
        self.kv.write(self.slots(self.row(request)[known : request.held]), request.rows[:, known : request.held])
        request.step = "cache"

    def wait_and_verify(self, request: Req, tokens: int) -> bool:
        """Returns: False if a load has failed; the request is over then."""
        if self.mover is not None:
            self.mover.run()
        self.counter.set_consumer(request.consumer)
        try:
            for layer in range(LAYERS):
                self.pool.layer_transfer_counter.wait_until(layer)
                self.verify(request, self.row(request)[:tokens], layer)
        except LoadError:
            self.done["load errors"] += 1
            self.abort(request)
            return False
        return True

    def do_cache(self, request: Req) -> None:
        """What was computed is cached; the row may have got others' slots, which may be loading."""
        self.cache.cache_unfinished_req(request)
        request.consumer = self.cache.ready_to_load_host_cache()
        request.step = "cached"
        assert torch.equal(request.prefix_indices.to(torch.int32), self.row(request)[: len(request.fill_ids)])
        assert request.last_node.lock_ref > 0

    def do_cached(self, request: Req) -> None:
        if not self.wait_and_verify(request, len(request.fill_ids)):
            return
        known, length = len(request.fill_ids), request.prompt + len(request.output_ids)
        if known < request.target:  # the next chunk
            request.fill_ids = request.all_ids[: min(request.target, known + request.chunk)]
            request.step = "extend"
            return
        if known == length:
            request.output_ids.append(request.all_ids[length])
        request.step = "decode"

    def do_decode(self, request: Req) -> None:
        """One more token, the end, or back to the queue."""
        length = request.prompt + len(request.output_ids)
        if length == len(request.all_ids):
            self.finish_request(request)
        elif self.chance(0.05):
            self.retract(request)
        elif self.extend(request, length):
            request.fill_ids = request.all_ids[:length]
            self.kv.write(self.slots(self.row(request)[length - 1 : length]), request.rows[:, length - 1 : length])
            request.output_ids.append(request.all_ids[length])
            if self.chance(0.3):
                self.verify(request, self.row(request)[:length])
            if self.chance(0.1):
                request.step = "cache"
        else:
            self.retract(request)

    def finish_request(self, request: Req) -> None:
        self.verify(request, self.row(request)[: request.held])
        self.cache.cache_finished_req(request)
        self.requests.remove(request)
        self.done["finished"] += 1

    def own_slots(self, request: Req) -> Any:
        """Of its row, those that are not the cache's."""
        cached = len(request.prefix_indices) // self.page_size * self.page_size
        return self.row(request)[cached : request.held]

    def release(self, request: Req) -> None:
        if request.req_pool_idx is not None:
            own = self.own_slots(request)
            if len(own):
                self.allocator.free(own)
            self.rows.free(request.req_pool_idx)
            self.cache.dec_lock_ref(request.last_node)
        request.req_pool_idx, request.prefix_indices, request.last_node, request.held = None, (), None, 0

    def retract(self, request: Req) -> None:
        """Its memory is taken away; it starts again from what the cache has of it."""
        self.done["retracted"] += 1
        self.release(request)
        request.step = "submit"

    def abort(self, request: Req) -> None:
        """It ends, wherever it is."""
        self.done[request.step] += 1
        self.cache.cancel_prefetch(request.rid)
        self.release(request)
        self.requests.remove(request)

    # ---- everything else ---------------------------------------------------------------------------------------------
    def insert(self) -> None:
        """Computed by somebody else."""
        tokens = self.prompt()
        tokens = tokens[: len(tokens) // self.page_size * self.page_size]
        self.cache.evict(max(0, len(tokens) - self.allocator.available_size()))
        slots = self.allocator.alloc(len(tokens))
        if slots is None:
            return
        salt = "salt" if self.chance(0.2) else None
        self.kv.write(self.slots(slots), self.content(tokens, None, salt))
        present = self.cache.insert(tokens, slots, cache_salt=salt)
        if present:
            self.allocator.free(slots[:present])

    def some_node(self) -> None:
        """Every method that takes a node, on any."""
        nodes = list(self.cache.tree)
        if not nodes:
            return
        node = self.cache.view(nodes[int(self.random.integers(len(nodes)))])
        what = str(self.random.choice(["backup", "store", "hit", "load", "lock", "protect", "look"]))
        if what == "backup":
            self.cache.write_backup(node, self.chance(0.2))
        elif what == "store":
            self.cache.write_backup_storage(node)
        elif what == "hit":
            self.cache.inc_hit_count(node)
        elif what == "load":
            self.cache.load_back(node, int(self.random.integers(0, 60)) if self.chance(0.5) else None)
        elif what == "lock":
            if not node.evicted and len(self.locked) < 3:
                self.cache.inc_lock_ref(node)
                self.locked.append(node)
        elif what == "protect":
            if node.backuped and len(self.protected) < 3:
                node.protect_host()
                self.protected.append(node)
        else:
            assert node.key == node.parent.children[self.child_key(node)].key
            assert (node.value is None) == node.evicted
            assert node.hash_value is None or len(node.hash_value) * self.page_size == len(node.key)

    def child_key(self, node: Any) -> Any:
        first: Any = node.key[0] if self.page_size == 1 else tuple(node.key[: self.page_size])
        info = self.cache.tree.node_info(node.id)
        return (info.namespace, first) if info.parent == ROOT and info.namespace else first

    def let_go(self) -> None:
        """Undo some locks of some_node."""
        if self.locked:
            self.cache.dec_lock_ref(self.locked.pop(int(self.random.integers(len(self.locked)))))
        if self.protected:
            self.protected.pop().release_host()

    def evict(self) -> None:
        self.cache.evict(int(self.random.integers(1, 40)))

    def evict_host(self) -> None:
        self.cache.evict_host(int(self.random.integers(1, 40)))

    def poll(self) -> None:
        self.now_s += 0.2 * self.local.random()
        checks = ("check_hicache_events", "check_hicache_events", "loading_check", "check_backup_progress")
        getattr(self.cache, checks[int(self.random.integers(4))])()

    def wait_for_writes(self) -> None:
        self.cache.writing_check(write_back=True)
        assert not self.stats().writes_in_flight

    def copy(self) -> None:
        if self.mover is not None and self.local.random() < self.copy_speed:
            self.mover.step()
        elif self.threads:
            time.sleep(0)

    def call_storage(self) -> None:
        if self.edge is None or self.local.random() >= self.storage_speed:
            return
        kinds = sorted({job.kind for job, _ in self.edge.waiting})
        if kinds:
            self.edge.step(kinds[int(self.local.integers(len(kinds)))])

    def machine(self) -> None:
        """The machine is idle, or busy, or slow; a call to storage takes no time, or some."""
        if self.threads:
            return
        self.mover.run()
        self.mover.instant, self.mover.begins = [(True, False), (False, False), (False, True)][self.local.integers(3)]
        if self.edge is not None:
            self.edge.begins = bool(self.local.integers(2))
        self.copy_speed, self.storage_speed = self.local.choice([1.0, 1.0, 1.0, 0.05], 2).tolist()

    def change_trouble(self) -> None:
        self.trouble = float(self.random.choice([0.0, 0.0, 0.0, 0.05, 0.3]))
        if self.storage is not None:
            self.storage.chance = self.trouble / 2
        if not self.threads:
            self.process.chance = float(self.random.choice([0.0, 0.0, 0.02, 0.2])) if self.trouble else 0.0

    def refuse(self) -> None:
        self.refused = int(self.random.integers(0, 3))

    def reset(self) -> None:
        """As a scheduler's flush: nothing runs, and the pools are cleared next to it."""
        self.drop_all()
        self.cache.reset()
        self.allocator.clear()
        self.rows.clear()
        self.check()
        assert self.cache.total_size() == 0

    def reattach(self) -> None:
        """Storage goes, and comes again: at times another object on the same folder."""
        self.count_pages()
        self.process.dies_in = 0  # nobody dies in here: what is half attached would be this test's own trouble
        self.cache.detach_storage_backend()
        self.edge = None
        self.check()
        chance, self.process.chance = self.process.chance, 0.0
        if self.storage is not None and self.chance(0.5):
            self.storage.close()
            inner = FileStorage(self.disk.root, **self.files)
            self.storage = Unreliable(inner, np.random.default_rng([self.seed, self.lives, self.at]))
        self.cache.attach_storage_backend(self.storage or "file")
        self.process.chance = chance

    def damage(self) -> None:
        self.disk.damage()

    def drop_all(self) -> None:
        for request in list(self.requests):
            self.abort(request)
        while self.locked or self.protected:
            self.let_go()

    def restart(self) -> None:
        self.finish()
        self.stop()

    def stats(self) -> Any:
        return self.cache.cache_controller.core.stats()

    # ---- checks ------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Each slot is free, in the tree, a request's own, or under a copy that was given up: once. And the rest."""
        self.cache.check_integrity()
        self.allocator.check_integrity()
        nodes = [info.page_ids for info in self.cache.tree.dump() if info.page_ids is not None]
        drains = self.cache.cache_controller.core._drains.operations
        mine = [np.unique(self.slots(self.own_slots(r)) // self.page_size) for r in self.requests if r.held]
        parts = [free_pages(self.allocator), *nodes, *mine, *(op.device_pages for op in drains if op.node == ROOT)]
        times = np.bincount(np.concatenate(parts).astype(np.int64), minlength=self.allocator.num_pages + 1)
        wrong = np.flatnonzero(times[1:] != 1) + 1
        assert not len(wrong), f"page {wrong[0]} is in {times[wrong[0]]} places"
        cached = sum(map(len, nodes)) * self.page_size
        sizes = self.cache.evictable_size(), self.cache.protected_size()
        assert sum(sizes) == self.cache.total_size() == cached, f"{sizes} of {cached}"
        running = sum(request.req_pool_idx is not None for request in self.requests)
        assert self.rows.available_size() == self.rows.size - running
        budget = self.files["max_bytes"]
        assert budget is None or self.process.chance or self.disk.used_bytes() <= budget, "over the budget"

    def finish(self) -> None:
        """All requests end; then everything must come to rest, and every slot back."""
        self.drop_all()
        self.trouble = self.refused = 0
        self.process.chance, self.process.dies_in = 0.0, 0
        if self.storage is not None:
            self.storage.chance = 0.0
        self.cache.ready_to_load_host_cache()
        self.rest()
        self.check()
        moving = self.moving()
        assert not moving, f"does not come to rest: {moving}"
        assert self.cache.protected_size() == 0
        if self.mover is not None:
            self.mover.instant = True
        while self.cache.evict(10**6):
            self.rest()
        while self.cache.evict_host(10**6):
            pass
        self.check()
        assert len(self.cache.tree) == 0, self.cache.tree.dump()
        assert self.allocator.available_size() == self.device_tokens
        host = self.cache.token_to_kv_pool_host
        assert host.available_size() == host.num_pages * self.page_size
        if self.mover is not None:
            self.mover.instant = False

    def moving(self) -> dict[str, int]:
        return {name: value for name, value in self.stats()._asdict().items()
                if value and ("in_flight" in name or "stuck" in name)}  # fmt: skip

    def rest(self) -> None:
        """Let everything end."""
        end_s = time.monotonic() + 30
        for _ in range(20) if not self.threads else iter(int, 1):
            if self.mover is not None:
                self.mover.run()
            if self.edge is not None:
                self.edge.run()
            self.now_s += 100.0
            self.cache.check_hicache_events()
            if self.threads and (not self.moving() or time.monotonic() > end_s):
                return
            time.sleep(0)

    def end(self) -> None:
        self.disk.running = self.process
        self.finish()
        self.close()

    ACTIONS = (
        (new_request, 10), (step_request, 70), (copy, 16), (call_storage, 36), (poll, 12), (evict, 6),
        (evict_host, 1.5), (some_node, 3), (let_go, 2), (insert, 1), (refuse, 0.5), (change_trouble, 0.5),
        (machine, 0.5), (wait_for_writes, 0.3), (reset, 0.1), (reattach, 0.1), (restart, 0.1),
        (CacheMachine.stop, 0.15), (CacheMachine.kill, 0.1), (CacheMachine.die_soon, 0.25), (damage, 1.5), (check, 3),
    )  # fmt: skip


def soak_cache(seed: int, steps: int, root: Path, **more: Any) -> Counter[str]:
    """One run. Args: more: of CacheSoak. Returns: what was found, served and what went wrong."""
    disk = Disk(root, seed)
    gc.freeze()
    gc.disable()  # to close may not depend on it, nor whether a seed fails
    try:
        with disk.installed():
            soak = CacheSoak(seed, disk, **more)
            with soak.scripted():
                soak.start()
                soak.run(steps)
    finally:
        gc.enable()
        gc.unfreeze()
    total = Counter(disk.faults)
    total.update(soak.found)
    total.update(soak.done)
    total.update({"served": soak.served_tokens, "lives": soak.lives, "requests": soak.requests_made})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="in all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first run")
    parser.add_argument("--steps-each", type=int, default=5_000, help="of a run, before the next seed")
    parser.add_argument("--threads", action="store_true", help="the real threads; a seed does not name a run then")
    parser.add_argument("--cuda", choices=["kernel", "direct", "auto"], help="on GPU 0, by this io backend")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    more: dict[str, Any] = {"threads": options.threads}
    if options.cuda:
        more = {"threads": True, "device": "cuda", "io_backend": options.cuda}
    began_s, seed, left, served = time.time(), options.seed, options.steps, 0
    while left > 0:
        steps = min(left, options.steps_each)
        try:
            with tempfile.TemporaryDirectory(prefix="radixkv-soak-", ignore_cleanup_errors=True) as folder:
                served += soak_cache(seed, steps, Path(folder), **more)["served"]
        except BaseException:
            again = f"python -m tests.hicache.soak --seed {seed} --steps {steps} --steps-each {steps}"
            again += f" --cuda {options.cuda}" if options.cuda else " --threads" * options.threads
            print(f"seed {seed} fails; again: {again}", file=sys.stderr)
            raise
        seed, left = seed + 1, left - steps
    seconds = time.time() - began_s
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "seeds": [options.seed, seed - 1],
                                            "served_tokens": served, "seconds": seconds}))  # fmt: skip
    print(f"{options.steps} steps, seeds {options.seed} .. {seed - 1}: {served} tokens verified, {seconds:.1f} s")


if __name__ == "__main__":
    main()
