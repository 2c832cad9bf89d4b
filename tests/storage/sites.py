"""Where each backend's values live during a test: a folder, a server that is started here, or this process.

A server that is not installed skips the tests that need it, with its name; with RADIXKV_REQUIRE_TOOLS=1 (.ci/run, which
installs all of them) they fail. Servers listen on loopback, on ports that the system chose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radixkv.storage import MemoryStorage, Storage, create_storage


class Site:
    """One place. ``open`` makes a client; clients of one site see the same values, which outlive them, unless
    ``shared`` is False."""

    name: str
    shared = True

    def __init__(self, folder: Path) -> None:
        """Args: folder: for what it keeps on disk."""
        self.folder = folder

    def open(self, **options: Any) -> Storage:
        raise NotImplementedError

    def stop(self) -> None:
        """End whatever was started."""


class MemorySite(Site):
    name, shared = "memory", False

    def open(self, **options: Any) -> Storage:
        return create_storage("memory", **options)


class DynamicSite(Site):
    name, shared = "dynamic", False

    def open(self, **options: Any) -> Storage:
        return create_storage("dynamic", path="tests.storage.sites:Plugged", **options)


class Plugged(MemoryStorage):
    """A backend from outside."""

    name = "plugged"


class FileSite(Site):
    name = "file"

    def open(self, **options: Any) -> Storage:
        return create_storage("file", path=self.folder / "store", **options)


class SyncedFileSite(FileSite):
    name = "file-fsync"

    def open(self, **options: Any) -> Storage:
        return super().open(fsync=True, segment_bytes=100_000, **options)


SITES: dict[str, type[Site]] = {kind.name: kind for kind in (MemorySite, DynamicSite, FileSite, SyncedFileSite)}
