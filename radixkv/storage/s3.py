"""L2: values as objects of an S3 bucket (AWS, MinIO, Ceph, R2, ...), by obstore, Rust's object_store for Python.

Server:   any; for tests ``pip install "moto[s3]" flask flask-cors`` and ``python -m moto.server -p 5000``
Client:   pip install radixkv[s3]

    S3Storage(bucket="kv", endpoint="http://127.0.0.1:9000", access_key_id=..., secret_access_key=...)

Credentials and region that are not given come from the environment (AWS_ACCESS_KEY_ID, ...) or the instance, as
object_store finds them. The bucket must exist. Budget and age are the bucket's lifecycle rules, which go by
the time of writing and tell nobody: ``lost`` is 0, and touch_many only looks up. A put asks first
whether the object is there (HEAD), which costs a tenth of a PUT and saves the upload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import StorageError, StorageTimeoutError
from .base import require_package
from .remote import RemoteStorage, Value

__all__ = ["S3Storage"]

T = TypeVar("T")


class S3Storage(RemoteStorage):
    """Objects ``prefix`` + key of one bucket, one request an object, ``num_threads`` at a time.

    Args:
        bucket, endpoint, access_key_id, secret_access_key, region: where and who.
        prefix: of all objects. timeout_s: of calls that name none, and of each request with its retries.
        connect_timeout_s: to connect. retries: of a request that failed on the way or with a 5xx.
    Raises: StorageError if obstore is missing or the options name no store. Nothing is asked before the first call.
    """

    name = "s3"
    chunk_keys = 1

    def __init__(self, *, bucket: str, endpoint: str | None = None, access_key_id: str | None = None,
                 secret_access_key: str | None = None, region: str | None = None, prefix: str = "radixkv.",
                 timeout_s: float = 10.0, connect_timeout_s: float = 2.0, retries: int = 2,
                 num_threads: int = 8) -> None:  # fmt: skip
        self._obstore = require_package("obstore", "radixkv[s3]", "radixkv.storage.s3")
        stores = require_package("obstore.store", "radixkv[s3]", "radixkv.storage.s3")
        super().__init__(prefix=prefix, timeout_s=timeout_s, num_threads=num_threads)
        given = {"endpoint": endpoint, "access_key_id": access_key_id, "secret_access_key": secret_access_key,
                 "region": region}  # fmt: skip
        try:
            self._store: Any = stores.S3Store(
                bucket,
                client_options={
                    "timeout": timedelta(seconds=timeout_s), "connect_timeout": timedelta(seconds=connect_timeout_s),
                    "allow_http": (endpoint or "").startswith("http://"),
                },
                retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=timeout_s)},
                **{name: value for name, value in given.items() if value is not None},
            )  # fmt: skip
        except self._obstore.exceptions.BaseError as error:
            raise StorageError(f"s3: {error}") from error

    def _put_chunk(self, keys: Sequence[str], values: Sequence[bytes]) -> Sequence[bool]:
        return [self._there(key) or self._put(key, value) for key, value in zip(keys, values, strict=True)]

    def _put(self, key: str, value: bytes) -> bool:
        self._obstore.put(self._store, key, value, use_multipart=False)
        return True

    def _get_chunk(self, keys: Sequence[str], sizes: Sequence[int]) -> Sequence[Value | None]:
        return [self._or_missing(self._get, key, None) for key in keys]

    def _get(self, key: str) -> Value:
        return self._obstore.get(self._store, key).bytes()

    def _exists_chunk(self, keys: Sequence[str]) -> Sequence[bool]:
        return [self._there(key) for key in keys]

    def _there(self, key: str) -> bool:
        return self._or_missing(self._head, key, False)

    def _head(self, key: str) -> bool:
        self._obstore.head(self._store, key)
        return True

    def _or_missing(self, function: Callable[[str], T], key: str, missing: T) -> T:
        try:
            return function(key)
        except (FileNotFoundError, self._obstore.exceptions.NotFoundError):
            return missing

    def _delete_chunk(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._or_missing(self._delete, key, None)

    def _delete(self, key: str) -> None:
        self._obstore.delete(self._store, key)

    def _clear(self) -> None:
        for some in self._obstore.list(self._store, chunk_size=1000):
            keys = [item["path"] for item in some if item["path"].startswith(self.prefix)]
            if keys:
                self._obstore.delete(self._store, keys)

    def _disconnect(self) -> None:
        """object_store closes its connections itself when they are idle."""

    def _translate(self, error: Exception) -> StorageError | None:
        if not isinstance(error, (self._obstore.exceptions.BaseError, OSError)):
            return None
        late = "timed out" in str(error) or "timeout" in str(error).lower()
        return (StorageTimeoutError if late else StorageError)(f"s3: {error}")
