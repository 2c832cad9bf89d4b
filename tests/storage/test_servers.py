"""Servers that are dead, silent, slow, killed in the middle and back again, and options that are wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError, StorageError, StorageTimeoutError
from radixkv.storage import Storage, create_storage
from radixkv.storage.breaker import BreakerConfig

from .kit import HostPages, digests, ids, page_store
from .sites import MooncakeSite, RedisSite, S3Site, Server, accepts, free_port, needed, tool
from .test_conformance import get, put


def redis_at(port: int, **options: Any) -> Storage:
    needed("redis")
    return create_storage("redis", url=f"redis://127.0.0.1:{port}/0", **options)


def s3_at(port: int, **options: Any) -> Storage:
    needed("obstore")
    return create_storage("s3", bucket="radixkv", endpoint=f"http://127.0.0.1:{port}", access_key_id="x",
                          secret_access_key="y", region="us-east-1", **options)  # fmt: skip


CLIENTS: dict[str, Callable[..., Storage]] = {"redis": redis_at, "s3": s3_at}


def calls(storage: Storage, **options: Any) -> list[Callable[[], object]]:
    return [
        lambda: storage.put_many(["a", "b"], [[b"x"], [b"y"]], **options),
        lambda: storage.get_many(["a", "b"], [[bytearray(1)], [bytearray(1)]], **options),
        lambda: storage.exists_many(["a", "b"], **options),
        lambda: storage.delete_many(["a", "b"], **options),
        lambda: storage.clear(**options),
    ]


class Silent:
    """A server that accepts, reads, and answers as it is told, a piece at a time: nothing, or a byte now and then."""

    def __init__(self, answer: bytes = b"", every_s: float = 0.0) -> None:
        self.answer, self.every_s = answer, every_s
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.stop = threading.Event()
        self.left = threading.Event()
        """Somebody was answered in full, or has hung up."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.stop.is_set():
            try:
                peer, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                peer.recv(65536)
                for at in range(len(self.answer)):
                    peer.sendall(self.answer[at : at + 1])
                    if self.stop.wait(self.every_s):
                        return
                self.left.set()
                self.stop.wait(20)
            except OSError:
                self.left.set()

    def close(self) -> None:
        self.stop.set()
        self.socket.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    made = Silent()
    yield made
    made.close()


@pytest.mark.parametrize("name", CLIENTS)
def test_a_server_that_accepts_and_never_answers(silent: Silent, name: str) -> None:
    storage = CLIENTS[name](silent.port, timeout_s=1.0)
    for call in calls(storage, timeout_s=0.15):
        start = time.monotonic()
        with pytest.raises(StorageTimeoutError):
            call()
        assert time.monotonic() - start < 1
    assert storage.stats()["late"] == 5
    start = time.monotonic()
    storage.close()
    assert time.monotonic() - start < 1


def test_a_call_without_a_deadline_has_that_of_the_store(silent: Silent) -> None:
    storage = redis_at(silent.port, timeout_s=0.2)
    start = time.monotonic()
    with pytest.raises(StorageTimeoutError):
        storage.exists_many(["a"])
    assert time.monotonic() - start < 1
    storage.close()


@pytest.mark.parametrize("name", CLIENTS)
def test_a_server_that_trickles(name: str) -> None:
    """No single read of its answer takes long; the whole of it would take minutes."""
    answers = {"redis": b"$100\r\n" + b"x" * 5000,
               "s3": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000}  # fmt: skip
    server = Silent(answers[name], 0.05)
    storage = CLIENTS[name](server.port, timeout_s=1.0)
    start = time.monotonic()
    with pytest.raises(StorageTimeoutError):
        storage.get_many(["a"], [[bytearray(100)]], timeout_s=0.3)
    assert time.monotonic() - start < 1
    server.close()
    storage.close()


def test_late_answers_touch_nothing() -> None:
    """The answer comes after the call has left: the parts, which may hold other pages by then, stay as they are."""
    server = Silent(b"*1\r\n$4\r\nLATE\r\n", 0.02)
    storage = redis_at(server.port, timeout_s=5.0)
    buffer = bytearray(b"mine")
    with pytest.raises(StorageTimeoutError):
        storage.get_many(["a"], [[buffer]], timeout_s=0.1)
    assert server.left.wait(20)
    assert buffer == b"mine"
    server.close()
    storage.close()


@pytest.mark.parametrize("name", CLIENTS)
def test_no_server_at_all(name: str) -> None:
    storage = CLIENTS[name](free_port(), timeout_s=2.0)
    for call in calls(storage):
        with pytest.raises(StorageError):
            call()
    storage.close()


@pytest.mark.parametrize("name", CLIENTS)
def test_answers_that_make_no_sense(name: str) -> None:
    answer = b"-ERR nonsense\r\n" * 50 if name == "redis" else b"nonsense\r\n\r\n" * 50
    server = Silent(answer)
    storage = CLIENTS[name](server.port, timeout_s=1.0)
    with pytest.raises(StorageError):
        storage.get_many(["a"], [[bytearray(1)]], timeout_s=0.5)
    with pytest.raises(StorageError):
        storage.exists_many(["a"], timeout_s=0.5)
    server.close()
    storage.close()


def test_pages_of_a_dead_store_cost_their_deadline_three_times_only(silent: Silent) -> None:
    storage = redis_at(silent.port, timeout_s=0.1)
    store = page_store(storage, HostPages(4), breaker=BreakerConfig(first_pause_s=30))
    start = time.monotonic()
    for _ in range(100):
        assert not store.get_pages(digests(2), ids(0, 1)).any()
    assert time.monotonic() - start < 2
    assert (store.counters.timeouts, store.counters.skipped) == (3, 97)
    storage.close()


# ---- real servers that go away ---------------------------------------------------------------------------------------
@pytest.fixture(params=[RedisSite, S3Site], ids=lambda kind: kind.name)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made = request.param(tmp_path)
    yield made
    made.stop()


def test_a_server_that_is_killed_and_comes_back(site: Any) -> None:
    """Its values are gone with it; the same client goes on."""
    storage = site.open(timeout_s=5.0)
    put(storage, {"a": 1000})
    site.server.kill()
    for call in calls(storage):
        with pytest.raises(StorageError):
            call()
    site.server.start()
    if isinstance(site, S3Site):
        site.make_bucket()
    assert get(storage, "a", 1000) is None
    put(storage, {"a": 1000})
    assert get(storage, "a", 1000) is not None
    storage.close()


def test_a_server_that_is_killed_in_the_middle_of_batches(site: Any) -> None:
    """Whatever pages were reported as hits are right; no call hangs or raises anything unexpected."""
    host = HostPages(128)
    storage = site.open(timeout_s=2.0)
    store = page_store(storage, host, breaker=BreakerConfig(failures=1000))
    pages = np.arange(64, dtype=np.int32)
    written = host.fill(pages, seed=1)
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            store.set_pages(digests(64), pages)
            flags = store.get_pages(digests(64), pages + 64)
            np.testing.assert_array_equal(host.read(pages + 64)[flags], written[flags])

    worker = threading.Thread(target=work)
    worker.start()
    end = time.monotonic() + 20
    while store.counters.hits < 64 and time.monotonic() < end:
        time.sleep(0.005)
    site.server.kill()
    while store.counters.errors + store.counters.timeouts == 0 and time.monotonic() < end:
        time.sleep(0.005)
    stopped.set()
    worker.join(20)
    assert not worker.is_alive()
    seen = store.counters
    assert seen.hits >= 64
    assert seen.errors + seen.timeouts > 0
    assert seen.corrupt + seen.foreign + seen.short == 0
    storage.close()


def test_a_full_redis_refuses(tmp_path: Path) -> None:
    site = RedisSite(tmp_path)
    site.server.kill()
    command = site.server._command
    site.server._command = lambda port: [*command(port), "--maxmemory", "3mb", "--maxmemory-policy", "noeviction"]
    site.server.start()
    storage = site.open()
    flags = [put(storage, {f"k{i}": 500_000})[0] for i in range(8)]
    assert flags[0]
    assert not flags[-1]
    assert storage.stats()["refused"] == flags.count(False)
    assert [get(storage, f"k{i}", 500_000) is not None for i in range(8)] == flags
    storage.close()
    site.stop()


def test_a_bucket_that_is_not_there(tmp_path: Path) -> None:
    site = S3Site(tmp_path)
    storage = create_storage("s3", bucket="nothing", endpoint=f"http://127.0.0.1:{site.server.port}",
                             access_key_id="x", secret_access_key="y", region="us-east-1")  # fmt: skip
    with pytest.raises(StorageError):
        storage.put_many(["a"], [[b"x"]])
    storage.close()
    site.stop()


def test_a_mooncake_master_that_is_stopped_killed_and_back(tmp_path: Path) -> None:
    """In a process of its own: Mooncake reads its time-outs once."""
    MooncakeSite(tmp_path).stop()  # skips here if it cannot be had
    command = [sys.executable, "-m", "tests.storage.mooncake_faults", str(tmp_path)]
    root = Path(__file__).parents[2]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}  # of stores made here
    done = subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.endswith("all of it\n"), done.stderr[-3000:]


# ---- options ---------------------------------------------------------------------------------------------------------
def test_wrong_options() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown storage 'tape': file, memory, .*dynamic"):
        create_storage("tape")
    with pytest.raises(InvalidArgumentError, match=r"does not take these options.*colour"):
        create_storage("memory", colour="red")
    with pytest.raises(InvalidArgumentError, match=r"does not take these options.*path"):
        create_storage("file")
    with pytest.raises(InvalidArgumentError, match=r"options \['max_bytes'\]"):
        create_storage(create_storage("memory"), max_bytes=1)
    with pytest.raises(InvalidArgumentError, match="storage 'dynamic' needs path="):
        create_storage("dynamic")
    with pytest.raises(StorageError, match="cannot import nowhere"):
        create_storage("nowhere:Class")
    with pytest.raises(InvalidArgumentError, match="has no Nothing"):
        create_storage("tests.storage.sites:Nothing")
    with pytest.raises(InvalidArgumentError, match="is no Storage, nor"):
        create_storage("tests.storage.sites:FileSite", folder=Path())
    with pytest.raises(InvalidArgumentError, match="returned no radixkv"):
        create_storage("tests.storage.sites:free_port")


@pytest.mark.parametrize(("backend", "package", "options"), [
    ("redis", "redis", {}), ("s3", "obstore", {"bucket": "b"}), ("mooncake", "mooncake.store", {}),
    ("nixl", "nixl_cu13._api", {"path": "/nonexistent"}),
])  # fmt: skip
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, backend: str, package: str, options: dict[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=rf"pip install radixkv\[{backend}\]"):
        create_storage(backend, **options)


def test_a_dynamic_class_as_sglang_names_it() -> None:
    options = {"backend_name": "x", "module_path": "radixkv.storage.memory", "class_name": "MemoryStorage"}
    storage = create_storage("dynamic", **options)
    assert storage.name == "memory"
    storage.close()
    with pytest.raises(InvalidArgumentError, match="needs path='module:Class', or module_path and class_name"):
        create_storage("dynamic")
    with pytest.raises(InvalidArgumentError, match=r"'bucket' \(HiCacheConfig: storage_options\)"):
        create_storage("s3")


def test_a_plugin_that_nixl_does_not_have(tmp_path: Path) -> None:
    needed("nixl_cu13")
    with pytest.raises(StorageError, match=r"no plugin 'TAPE'; it has .*POSIX"):
        create_storage("nixl", path=tmp_path, plugin="TAPE")
    with pytest.raises((StorageError, InvalidArgumentError)):
        create_storage("nixl", path=tmp_path, plugin="UCX")



# ---- what a Redis server evicts --------------------------------------------------------------------------------------
@pytest.fixture
def small_redis(tmp_path: Path) -> Iterator[Server]:
    """Room for about two hundred values of 10,000 bytes."""
    needed("redis")
    program = tool("redis-server")
    options = ["--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path), "--maxmemory", "4mb", "--maxmemory-policy",
               "allkeys-lfu"]  # fmt: skip
    server = Server(lambda port: [program, "--port", str(port), *options], accepts, tmp_path / "log")
    yield server
    server.kill()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_redis_tells_what_it_evicts(small_redis: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.storage.redis.ASK_S", 0.0)
    with redis_at(small_redis.port) as storage:
        put(storage, {"a": 1000})
        assert storage.lost() == 0
        assert until(lambda: storage.lost() == 0 and storage._seen is not None)  # type: ignore[attr-defined]
        before = storage.lost()
        put(storage, {f"k{number}": 10_000 for number in range(800)})
        assert until(lambda: storage.lost() > before)
        told = storage.lost()
        small_redis.kill()
        for _ in range(20):
            assert storage.lost() == told  # a dead server raises nothing, and says nothing
        small_redis.start()
        assert until(lambda: storage.lost() > told), "all is gone"
    assert storage.lost() > 0  # closed: no more questions


def test_redis_touches_what_is_there(small_redis: Server) -> None:
    """TOUCH and a put of what is there count as use; EXISTS does not."""
    import redis

    client = redis.Redis(port=small_redis.port)

    def uses(key: str) -> int:
        return int(client.object("freq", f"radixkv.{key}"))

    with redis_at(small_redis.port) as storage:
        put(storage, {"a": 10, "b": 10, "c": 10})
        new = uses("a")
        assert storage.exists_many(["a", "b"]).all()
        assert (uses("a"), uses("b")) == (new, new)
        assert storage.touch_many(["a", "b"]).tolist() == [True, True]
        assert storage.touch_many(["none", "b", "b"]).tolist() == [False, True, True]
        put(storage, {"c": 10})
        assert min(uses("a"), uses("b"), uses("c")) > new
    client.close()


def test_a_redis_that_may_not_be_touched(small_redis: Server, caplog: pytest.LogCaptureFixture) -> None:
    """An operator's ACL, or a proxy, knows a few commands only."""
    import redis

    client = redis.Redis(port=small_redis.port)
    client.execute_command("ACL", "SETUSER", "engine", "on", ">word", "~*", "+@all", "-touch")
    with create_storage("redis", url=f"redis://engine:word@127.0.0.1:{small_redis.port}/0") as storage:
        for _ in range(2):
            assert storage.put_many(["a", "b"], [[b"1"], [b"2"]]).tolist() == [True, True]
            assert storage.touch_many(["a", "c"]).tolist() == [True, False]
    assert [record.message.split()[0] for record in caplog.records] == ["storage=no_touch"]
    client.close()
