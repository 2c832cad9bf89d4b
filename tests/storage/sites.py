"""Where each backend's values live during a test: a folder, a server that is started here, or this process.

A server that is not installed skips the tests that need it, with its name; with RADIXKV_REQUIRE_TOOLS=1 (.ci/run, which
installs all of them) they fail. Servers listen on loopback, on ports that the system chose.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radixkv.storage import MemoryStorage, Storage, create_storage

from ..abi.toolchain import missing, tool


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


class PluginSite(Site):
    """A class with SGLang's interface, by its path."""

    name = "plugin"

    def open(self, **options: Any) -> Storage:
        return create_storage("tests.storage.plugin:Plugin", folder=self.folder / "plugin", **options)


class FileSite(Site):
    name = "file"

    def open(self, **options: Any) -> Storage:
        return create_storage("file", path=self.folder / "store", **options)


class SyncedFileSite(FileSite):
    name = "file-fsync"

    def open(self, **options: Any) -> Storage:
        return super().open(fsync=True, segment_bytes=100_000, **options)


class Server:
    """A server process on a loopback port. ``ready`` is asked until it says True; it gets the port."""

    def __init__(self, command: Callable[[int], list[str]], ready: Callable[[int], bool], log: Path) -> None:
        self.port, self._command, self._ready, self._log = free_port(), command, ready, log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command(self.port), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while not self._ready(self.port):
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"{self._command(self.port)[0]} did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """Of loopback, not in use now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether someone listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def needed(module: str) -> None:
    """Skip, or fail, without a Python package."""
    if importlib.util.find_spec(module) is None:
        missing(f"the package {module} is not installed")


class RedisSite(Site):
    name = "redis"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        needed("redis")
        program = tool("redis-server")
        options = ["--bind", "127.0.0.1", "--save", "", "--maxmemory", "256mb", "--dir", str(folder)]
        self.server = Server(lambda port: [program, "--port", str(port), *options], accepts, folder / "log")

    def open(self, **options: Any) -> Storage:
        return create_storage("redis", url=f"redis://127.0.0.1:{self.server.port}/0", **options)

    def stop(self) -> None:
        self.server.kill()


class S3Site(Site):
    name = "s3"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for module in ("obstore", "moto", "flask", "flask_cors"):
            needed(module)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
        self.server = Server(lambda port: [*command, str(port)], accepts, folder / "log")
        self.make_bucket()

    def make_bucket(self) -> None:
        who = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request"}
        url = f"http://127.0.0.1:{self.server.port}/radixkv"
        urllib.request.urlopen(urllib.request.Request(url, data=b"", method="PUT", headers=who), timeout=30).close()

    def open(self, **options: Any) -> Storage:
        return create_storage("s3", bucket="radixkv", endpoint=f"http://127.0.0.1:{self.server.port}",
                              access_key_id="x", secret_access_key="y", region="us-east-1", **options)  # fmt: skip

    def stop(self) -> None:
        self.server.kill()


class NixlSite(Site):
    name = "nixl"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        needed("nixl_cu13")

    def open(self, **options: Any) -> Storage:
        return create_storage("nixl", path=self.folder / "store", **options)


class MooncakeSite(Site):
    """A master, and a client that lends memory, so that values outlive the clients of the tests."""

    name = "mooncake"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        needed("mooncake")
        try:
            importlib.import_module("mooncake.store")
        except ImportError as error:
            missing(f"mooncake.store cannot be loaded (libibverbs1?): {error}")
        self.master = Server(self._master, accepts, folder / "master.log")
        self.lender = Server(self._lender, accepts, folder / "lender.log")

    def _master(self, port: int) -> list[str]:
        return [self._program("mooncake_master"), "--rpc_address", "127.0.0.1", "--rpc_port", str(port),
                "--metrics_port", str(free_port()), "--enable_metric_reporting=false"]  # fmt: skip

    def _lender(self, port: int) -> list[str]:
        return [self._program("mooncake_client"), "--host", "127.0.0.1", "--port", str(port), "--protocol", "tcp",
                "--master_server_address", f"127.0.0.1:{self.master.port}", "--metadata_server", "P2PHANDSHAKE",
                "--global_segment_size", "256MB", "--http_port", str(free_port())]  # fmt: skip

    @staticmethod
    def _program(name: str) -> str:
        """Of the wheel, whose own launchers need packages that nothing else needs."""
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        path = Path(spec.submodule_search_locations[0]) / name
        path.chmod(0o755)
        return str(path)

    def open(self, **options: Any) -> Storage:
        return create_storage("mooncake", master=f"127.0.0.1:{self.master.port}", **options)

    def stop(self) -> None:
        self.lender.kill()
        self.master.kill()


KINDS = (MemorySite, DynamicSite, PluginSite, FileSite, SyncedFileSite, RedisSite, S3Site, NixlSite, MooncakeSite)
SITES: dict[str, type[Site]] = {kind.name: kind for kind in KINDS}
