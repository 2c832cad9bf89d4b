"""L2: the file backend with NVIDIA's NIXL moving the bytes: kernel AIO (plugin POSIX) or GPUDirect Storage (GDS).

Client:   pip install radixkv[nixl]     (nixl-cu13; 59 MB. Not ``pip install nixl``, which pulls both CUDA variants)

    NixlStorage(path="/var/lib/radixkv", max_bytes=1 << 40)

Folder, budget, durability and counters are those of ``FileStorage`` (file.py), byte for byte: a folder written by the
one can be read and shared by the other. Each segment is one NIXL transfer of all its parts, from where they lie:
register the host pool's arena (``register``); parts elsewhere are registered for the call, at tens of microseconds.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from ..errors import InvalidArgumentError, StorageError
from .base import Buffer, Deadline, require_package
from .file import FileStorage
from .memories import Memories, address_of

__all__ = ["NixlStorage"]

_PAUSE_S = 0.00005
"""Between two looks at a transfer; NIXL has nothing to wait on."""


class NixlStorage(FileStorage):
    """Values in segments of a folder, moved by a NIXL plugin for files.

    Args:
        plugin: "POSIX", or another of NIXL's that moves between host memory and files ("GDS", "GDS_MT").
        plugin_options: of the plugin, e.g. {"use_uring": "true"}.
        options: those of FileStorage.
    Raises: StorageError if NIXL is missing, or lacks the plugin.
    """

    name = "nixl"
    run_bytes = 8 << 20  # a transfer a segment: each costs a registration of the file

    def __init__(self, path: str | os.PathLike[str], *, plugin: str = "POSIX",
                 plugin_options: dict[str, str] | None = None, **options: Any) -> None:  # fmt: skip
        os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what fails is counted here
        api = require_package("nixl_cu13._api", "radixkv[nixl]", "radixkv.storage.nixl")
        config = api.nixl_agent_config(backends=[], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
        self._agent = api.nixl_agent(f"radixkv-{uuid.uuid4()}", config)
        self._plugin = plugin
        if plugin not in self._agent.get_plugin_list():
            raise StorageError(f"NIXL has no plugin {plugin!r}; it has {', '.join(self._agent.get_plugin_list())}")
        try:
            self._agent.create_backend(plugin, plugin_options or {})
        except Exception as error:  # each kind of NIXL's errors is its own class below Exception
            raise StorageError(f"NIXL plugin {plugin}: {error}") from error
        if not {"DRAM_SEG", "FILE_SEG"} <= set(self._agent.get_backend_mem_types(plugin)):
            raise InvalidArgumentError(f"NIXL plugin {plugin} does not move between host memory and files")
        self._memories = Memories(self._add_memory, self._remove_memory)
        super().__init__(path, **options)

    def register(self, memory: Buffer) -> None:
        self._memories.register(memory)

    def unregister(self, memory: Buffer) -> None:
        self._memories.unregister(memory)

    def close(self) -> None:
        super().close()
        self._memories.clear()

    def _add_memory(self, address: int, num_bytes: int) -> object:
        return self._agent.register_memory([(address, num_bytes, 0, "")], "DRAM", backends=[self._plugin])

    def _remove_memory(self, address: int, num_bytes: int, descriptors: object) -> None:
        self._agent.deregister_memory(descriptors, backends=[self._plugin])

    # ---- how bytes move ----------------------------------------------------------------------------------------------
    def _write_all(self, fd: int, views: Sequence[memoryview], at: int, deadline: Deadline) -> int:
        deadline.remaining_s()
        self._transfer("WRITE", fd, views, at)
        return sum(map(len, views))

    def _read_all(self, fd: int, views: Sequence[memoryview], at: int, deadline: Deadline) -> int:
        deadline.remaining_s()
        wanted = sum(map(len, views))
        if at + wanted > os.fstat(fd).st_size:  # NIXL would fail as a whole: what is there is read by the kernel
            return super()._read_all(fd, views, at, deadline)
        self._transfer("READ", fd, views, at)
        return wanted

    def _transfer(self, operation: str, fd: int, views: Sequence[memoryview], at: int) -> None:
        """Move all bytes between views and the file. Raises: OSError (EREMOTEIO: NIXL does not say why)."""
        pieces = [(address_of(view), len(view), 0) for view in views if len(view)]
        sizes = [size for _, size, _ in pieces]
        offsets = accumulate(sizes, initial=at)
        try:
            with self._registered(fd, at + sum(sizes), pieces):
                memory = self._agent.get_xfer_descs(pieces, "DRAM")
                file = self._agent.get_xfer_descs([(o, s, fd) for o, s in zip(offsets, sizes, strict=False)], "FILE")
                handle = self._agent.initialize_xfer(operation, memory, file, self._agent.name, backends=[self._plugin])
                try:
                    self._wait(handle)
                finally:
                    self._agent.release_xfer_handle(handle)
        except OSError:
            raise
        except Exception as error:  # each kind of NIXL's errors is its own class below Exception
            raise OSError(errno.EREMOTEIO, f"NIXL {operation}: {error}") from error

    def _wait(self, handle: Any) -> None:
        state = self._agent.transfer(handle)
        while state == "PROC":
            time.sleep(_PAUSE_S)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise OSError(errno.EREMOTEIO, f"NIXL ended with {state}")

    @contextmanager
    def _registered(self, fd: int, file_bytes: int, pieces: Sequence[tuple[int, int, int]]) -> Iterator[None]:
        """The file, and the pieces that lie in no registered memory, are registered for a while."""
        strays = [(address, size, 0, "") for address, size, _ in pieces if not self._memories.holds(address, size)]
        file = self._agent.register_memory([(0, file_bytes, fd, "")], "FILE", backends=[self._plugin])
        try:
            memory = self._agent.register_memory(strays, "DRAM", backends=[self._plugin]) if strays else None
            try:
                yield
            finally:
                if memory is not None:
                    self._agent.deregister_memory(memory, backends=[self._plugin])
        finally:
            self._agent.deregister_memory(file, backends=[self._plugin])
