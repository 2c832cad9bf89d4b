"""What a client of Mooncake does when its master is stopped, killed, and back.

``python -m tests.storage.mooncake_faults DIR``; run by test_servers.py, in a process of its own, because Mooncake reads
its time-outs once.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError, StorageError, StorageTimeoutError
from radixkv.storage import Storage, create_storage

from .sites import MooncakeSite
from .test_conformance import get, put
from .test_servers import calls


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for a condition; StorageError means not yet."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except StorageError:
            pass
        assert time.monotonic() < end
        time.sleep(0.05)


def a_master_that_is_stopped(site: MooncakeSite, storage: Storage) -> None:
    """Look-ups and deletes leave in time; puts and gets, once Mooncake gives up."""
    site.master.process.send_signal(signal.SIGSTOP)
    for number, call in enumerate(calls(storage, timeout_s=0.3)):
        start = time.monotonic()
        with pytest.raises(StorageTimeoutError):
            call()
        taken = time.monotonic() - start
        print(call.__code__.co_names, round(taken, 2))
        assert taken < (5 if number < 2 else 0.8), number
    site.master.process.send_signal(signal.SIGCONT)
    until(lambda: put(storage, {"d": 1000}) == [True])
    assert get(storage, "d", 1000) is not None
    # the put that was given up: the master keeps its key for a while, and says that it is there already
    assert (put(storage, {"b": 1000}) == [True]) == (get(storage, "b", 1000) is not None)


def a_master_that_is_killed(site: MooncakeSite, storage: Storage) -> None:
    """Its values are gone; the clients lend their memory to the new one."""
    site.master.kill()
    for call in calls(storage):
        with pytest.raises(StorageError):
            call()
    site.master.start()
    until(lambda: put(storage, {"c": 1000}) == [True])
    assert get(storage, "c", 1000) is not None
    assert get(storage, "a", 1000) is None


def memory(storage: Storage) -> None:
    """Registered, overlapping, and none at all for a value that no slab holds."""
    large = np.zeros(9 << 20, np.uint8)
    assert storage.put_many(["large"], [[large]]).tolist() == [False]
    assert storage.stats()["refused"] == 1
    storage.register(large)
    with pytest.raises(InvalidArgumentError, match="overlap"):
        storage.register(large[100:200])
    assert storage.put_many(["large"], [[large]]).tolist() == [True]
    storage.unregister(large)


def main() -> None:
    site = MooncakeSite(Path(sys.argv[1]))
    try:
        storage = site.open(timeout_s=1.0, segment_bytes=32 << 20)
        assert put(storage, {"a": 1000}) == [True]
        memory(storage)
        a_master_that_is_stopped(site, storage)
        a_master_that_is_killed(site, storage)
        storage.close()
    finally:
        site.stop()
    with pytest.raises(StorageError, match="no store at"):
        create_storage("mooncake", master=f"127.0.0.1:{site.master.port}")
    print("all of it")


if __name__ == "__main__":
    main()
