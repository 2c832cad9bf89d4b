"""L2: values in a server that speaks the Redis protocol (Redis, Valkey, KeyDB, Dragonfly), by redis-py.

Server:   apt-get install redis-server
          redis-server --bind 127.0.0.1 --save "" --maxmemory 8gb --maxmemory-policy allkeys-lru
Client:   pip install radixkv[redis]     (redis-py, and hiredis, which reads replies five times as fast)

    RedisStorage(url="redis://127.0.0.1:6379/0")

The budget is the server's: with ``allkeys-lru`` it evicts; without, what it has no room for is refused (and counted).
It evicts single keys, of chains too. A put of what is there and touch_many count as use (TOUCH; all keys, as a chain is
worth no more than its first gap). ``lost`` follows the server's own count of evicted and expired keys, those of others
too, which is asked for in the background once a second; a restart counts as well, FLUSHALL does not. Where TOUCH is not
allowed, or not known (a proxy), EXISTS is asked instead, and nothing but a read counts as use; that is logged once.
Values of up to 512 MiB. One copy on the way in and one on the way out, by redis-py's own buffers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import StorageError, StorageTimeoutError
from .base import require_package
from .remote import RemoteStorage, Value

__all__ = ["RedisStorage"]

_log = logging.getLogger("radixkv.storage")

ASK_S = 1.0
"""Between two questions to the server how much it has evicted."""


class RedisStorage(RemoteStorage):
    """Values as strings of one Redis server.

    Args:
        url: redis://[user:password@]host:port/database, rediss:// for TLS, unix:// for a socket.
        prefix: of all keys. timeout_s: of calls that name none, and of any single reply. connect_timeout_s: to connect.
        num_threads: workers, each with its own connection.
    Raises: StorageError if redis-py is missing. No connection is made before the first call; a lost one is made again.
    """

    name = "redis"

    def __init__(self, *, url: str = "redis://127.0.0.1:6379/0", prefix: str = "radixkv.", timeout_s: float = 5.0,
                 connect_timeout_s: float = 1.0, num_threads: int = 4) -> None:  # fmt: skip
        self._redis = require_package("redis", "radixkv[redis]", "radixkv.storage.redis")
        super().__init__(prefix=prefix, timeout_s=timeout_s, num_threads=num_threads)
        retries = require_package("redis.retry", "radixkv[redis]", "radixkv.storage.redis")
        backoff = require_package("redis.backoff", "radixkv[redis]", "radixkv.storage.redis")
        lost = (self._redis.exceptions.ConnectionError,)
        pool = self._redis.ConnectionPool.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=connect_timeout_s,
            health_check_interval=30,
            retry=retries.Retry(backoff.NoBackoff(), 1, lost),  # the server may have closed an idle one
        )
        self._client: Any = self._redis.Redis(connection_pool=pool)
        self._ask_at_s, self._asking = 0.0, False
        self._seen: tuple[object, ...] | None = None
        self._lost = 0
        self._may_touch = True

    def lost(self) -> int:
        pool, now_s = self._pool, time.monotonic()
        if pool is not None and not self._asking and now_s >= self._ask_at_s:
            self._ask_at_s = now_s + ASK_S
            with suppress(StorageError):  # closed just now, or no thread to be had
                self._asking = True
                pool.submit(self._ask_what_is_lost)
                return self._lost
            self._asking = False
        return self._lost

    def _ask_what_is_lost(self) -> None:
        try:
            counts, server = self._client.info("stats"), self._client.info("server")
            seen = (server.get("run_id"), counts.get("evicted_keys"), counts.get("expired_keys"))
            if self._seen is not None and seen != self._seen:
                self._lost += 1
            self._seen = seen
        except (self._redis.exceptions.RedisError, OSError):
            pass  # whoever wants values will notice
        finally:
            self._asking = False

    def _put_chunk(self, keys: Sequence[str], values: Sequence[bytes]) -> Sequence[bool]:
        there = self._use(keys)
        pipe = self._client.pipeline(transaction=False)
        for key, value, exists in zip(keys, values, there, strict=True):
            if not exists:
                pipe.set(key, value)
        answers = iter(pipe.execute(raise_on_error=False))
        flags = [exists or next(answers) is True for exists in there]
        self._count("refused", flags.count(False))
        return flags

    def _get_chunk(self, keys: Sequence[str], sizes: Sequence[int]) -> Sequence[Value | None]:
        values: list[bytes | None] = self._client.mget(keys)
        return values

    def _exists_chunk(self, keys: Sequence[str]) -> Sequence[bool]:
        return self._ask("exists", keys)

    def _touch_chunk(self, keys: Sequence[str]) -> Sequence[bool]:
        with self._without_touch():
            if self._may_touch and self._client.touch(*keys) == len(keys):  # which are missing it does not say
                return [True] * len(keys)
        return self._exists_chunk(keys)

    def _use(self, keys: Sequence[str]) -> list[bool]:
        """Whether keys are there; those that are count as used."""
        with self._without_touch():
            if self._may_touch:
                return self._ask("touch", keys)
        return self._ask("exists", keys)

    @contextmanager
    def _without_touch(self) -> Iterator[None]:
        """A server that does not want to touch is not asked again."""
        try:
            yield
        except self._redis.exceptions.ResponseError as error:
            refused = isinstance(error, self._redis.exceptions.NoPermissionError)
            if not refused and "unknown command" not in str(error).lower():
                raise
            self._may_touch = False
            _log.warning("storage=no_touch backend=redis error=%r", str(error))

    def _ask(self, command: str, keys: Sequence[str]) -> list[bool]:
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            getattr(pipe, command)(key)
        return [bool(answer) for answer in pipe.execute()]

    def _delete_chunk(self, keys: Sequence[str]) -> None:
        self._client.unlink(*keys)

    def _clear(self) -> None:
        some: list[bytes] = []
        for key in self._client.scan_iter(match=f"{self.prefix}*", count=1000):
            some.append(key)
            if len(some) == 1000:
                self._client.unlink(*some)
                some.clear()
        if some:
            self._client.unlink(*some)

    def _disconnect(self) -> None:
        self._client.close()
        self._client.connection_pool.disconnect()

    def _translate(self, error: Exception) -> StorageError | None:
        errors = self._redis.exceptions
        if isinstance(error, errors.TimeoutError):
            return StorageTimeoutError(f"redis: {error}")
        return StorageError(f"redis: {error}") if isinstance(error, (errors.RedisError, OSError)) else None
