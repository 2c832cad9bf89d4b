"""L2: backends by name, for configuration files and command lines."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidArgumentError, StorageError
from .base import Storage
from .sglang_api import PluginStorage, is_plugin

__all__ = ["BACKENDS", "create_storage"]

BACKENDS: Mapping[str, str] = {
    "file": "radixkv.storage.file:FileStorage",
    "memory": "radixkv.storage.memory:MemoryStorage",
    "mooncake": "radixkv.storage.mooncake:MooncakeStorage",
    "nixl": "radixkv.storage.nixl:NixlStorage",
    "redis": "radixkv.storage.redis:RedisStorage",
    "s3": "radixkv.storage.s3:S3Storage",
}
"""Name -> module:class. Modules are imported when they are asked for."""


def create_storage(name: str | Storage, **options: Any) -> Storage:
    """Make a backend.

    Args:
        name: one of BACKENDS; "dynamic" with the option ``path``, "module:Class" (or ``module_path`` and
            ``class_name``); "module:Class" itself; or a backend,
            which is returned as it is. The class is a Storage, or has SGLang's interface (sglang_api.py).
        options: keyword arguments of the backend's class.
    Raises: InvalidArgumentError for an unknown name, unknown options, or a class that is no Storage; StorageError if a
        package is missing (it is named) or the backend cannot be reached.
    """
    if isinstance(name, Storage):
        if options:
            raise InvalidArgumentError(f"options {sorted(options)} for a storage that is made already")
        return name
    path = BACKENDS.get(name, name)
    if name == "dynamic":
        path = str(options.pop("path", ""))
        if "module_path" in options and "class_name" in options:  # as SGLang names them
            path = f"{options.pop('module_path')}:{options.pop('class_name')}"
            options.pop("backend_name", None)
        if ":" not in path:
            raise InvalidArgumentError("storage 'dynamic' needs path='module:Class', or module_path and class_name")
    if ":" not in path:
        names = ", ".join(sorted(BACKENDS))
        raise InvalidArgumentError(f"unknown storage {name!r}: {names}, dynamic with path=, or module:Class")
    found = _load(path)
    plugin = isinstance(found, type) and not issubclass(found, Storage)
    if plugin and not is_plugin(found):
        raise InvalidArgumentError(f"{path} is no Storage, nor a HiCacheStorage: its bases are {found.__mro__}")
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        hint = "HiCacheConfig: storage_options"
        raise InvalidArgumentError(f"storage {name!r} does not take these options: {error} ({hint})") from error
    made = found(**options)
    if plugin:
        return PluginStorage(made)
    if not isinstance(made, Storage):
        raise InvalidArgumentError(f"{path} returned no radixkv.storage.Storage but a {type(made).__name__}")
    return made


def _load(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise StorageError(f"storage {path}: cannot import {module_name}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise InvalidArgumentError(f"storage {path}: {module_name} has no {attribute}") from error
