"""L6: ``radixkv doctor``: what this machine offers, and what radixkv will use of it, with the reason.

Each probe is on its own: one that fails is a line of the table, with its error, and takes no other with it. What is
used follows from the findings alone (``decide``), so that every combination can be tried without the machine.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .errors import DeviceUnavailableError
from .paths import get_library_path
from .pool.arena import online_nodes
from .pool.memory import DEFAULT_HEADROOM_BYTES, host_memory, read_text, usable_cpus
from .pool.pinning import cuda_registrar
from .transfer.choose import ENVIRONMENT, Chooser, PathName
from .transfer.cuda import FATBIN
from .tree.page_hash import sha256_provider

__all__ = ["Choice", "Diagnosis", "Finding", "Machine", "decide", "diagnose", "tables", "text"]

C_LAUNCHER = "libradixkv_cuda.so.1"
C_LAUNCHER_ABI = 1

_MIB, _GB = 1024**2, 1e9
_COPY_BYTES = 256 * _MIB  # well beyond any cache
_COPIES = 5
_MAX_THREADS = 8
_EXTENSIONS = ("avx2", "avx512f", "avx512bw", "avx512_vbmi", "amx_tile", "asimd", "sve", "sve2")

Status = Literal["ok", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. missing: not there, which is no fault. failed: there, and not usable, or the probe itself broke.

    data: figures for programs (bytes, counts, versions). brief: the value without its cause, for the reasons of
    choices; "": the value.
    """

    name: str
    status: Status
    value: str
    data: dict[str, Any] = field(default_factory=dict)
    brief: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """What radixkv will use for one purpose, and why not something better."""

    purpose: str
    uses: str
    reason: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in order, and the choices that follow from them."""

    findings: list[Finding]
    choices: list[Choice]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"findings": [asdict(f) for f in self.findings], "will_use": [asdict(c) for c in self.choices]}


class Machine:
    """What probes ask. Tests put other answers in its place."""

    root = Path("/")

    def read(self, path: str) -> str | None:
        """A file below root; None if it cannot be read."""
        return read_text(self.root / path)

    def which(self, program: str) -> str | None:
        """The path of a program."""
        return shutil.which(program)

    def run(self, *command: str) -> str:
        """The standard output of a command, within ten seconds. Raises: OSError, subprocess.SubprocessError."""
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout

    def load(self, module: str) -> Any:
        """A Python module. Raises: ImportError, OSError."""
        return importlib.import_module(module)

    def library(self, *names: str) -> Any:
        """The first shared library of these that loads. Raises: OSError."""
        error = OSError("no library")
        for name in names:
            try:
                return ctypes.CDLL(name)
            except OSError as this:
                error = this
        raise error

    def memlock_bytes(self) -> int:
        """The soft limit of locked memory; -1 = none."""
        import resource

        return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]

    def registrar_name(self) -> str:
        """What would page-lock. Raises: DeviceUnavailableError."""
        return cuda_registrar().name

    def environment(self, name: str) -> str:
        """A variable of the environment; "" if it is not set."""
        return os.environ.get(name, "")

    def shipped(self, name: str) -> Path | None:
        """A file that the build left beside the plugin; None if it did not."""
        path = Path(get_library_path()).with_name(name)
        return path if path.is_file() else None

    def chooser(self) -> Chooser:
        """What chooses between kernels and copy engine on the first GPU. Raises: ImportError, RuntimeError."""
        return Chooser(importlib.import_module(".transfer.gpu", __package__).device_key(0), override="kernel")

    def sha256_provider(self) -> str:
        """What hashes pages: libcrypto's words for itself, or "hashlib"."""
        return sha256_provider()

    def cpus(self) -> int:
        """CPUs that this process may use."""
        return usable_cpus()


# ---- probes ----------------------------------------------------------------------------------------------------------
def _cpu(machine: Machine) -> Finding:
    lines = [line.partition(":") for line in (machine.read("proc/cpuinfo") or "").splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = [name for name in _EXTENSIONS if name in flags]
    model = fields.get("model name", platform.machine())
    value = f"{model}, {machine.cpus()} CPUs, {' '.join(found) or 'no known vector extensions'}"
    return Finding("cpu", "ok", value, {"cpus": machine.cpus(), "extensions": found, "model": model})


def _gpu(machine: Machine) -> Finding:
    query = "--query-gpu=name,memory.total,compute_cap"
    if machine.which("nvidia-smi") is None:
        return Finding("gpu", "missing", "no nvidia-smi", {"count": 0})
    devices = machine.run("nvidia-smi", query, "--format=csv,noheader").strip().splitlines()
    return Finding("gpu", "ok" if devices else "missing", "; ".join(devices) or "none", {"count": len(devices)})


def _driver(machine: Machine) -> Finding:
    try:
        cuda = machine.library("libcuda.so.1")
    except OSError as error:
        return _no_library("driver", "libcuda.so.1", error)
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    name = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if code:
        return Finding("driver", "failed", f"{name}, but it does not start: error {code}", {"version": version.value})
    return Finding("driver", "ok", f"{name}, {count.value} devices", {"version": version.value, "count": count.value})


def _no_library(name: str, library: str, error: OSError) -> Finding:
    """The loader's text begins with the name of the file, which is said already."""
    cause = re.sub(rf"^{re.escape(library)}[\w.]*: ", "", str(error))
    return Finding(name, "missing", f"no {library} ({cause})", brief=f"no {library}")


def _torch(machine: Machine) -> Finding:
    try:
        torch = machine.load("torch")
    except ImportError as error:
        return Finding("torch", "missing", str(error), {"devices": 0})
    count = torch.cuda.device_count()
    built = torch.version.cuda
    value = f"{torch.__version__}, " + (f"CUDA {built}, {count} devices" if built else "a CPU build")
    return Finding("torch", "ok", value, {"version": str(torch.__version__), "cuda": built, "devices": count})


def _cupy(machine: Machine) -> Finding:
    try:
        cupy = machine.load("cupy")
    except ImportError as error:
        return Finding(
            "cupy", "missing", f"{error}; pip install 'radixkv[cuda12]' or 'radixkv[cuda13]'", {"devices": 0}
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        return Finding("cupy", "failed", f"{cupy.__version__} sees no GPU: {error}", {"devices": 0})
    return Finding(
        "cupy", "ok", f"{cupy.__version__}, {count} devices", {"version": cupy.__version__, "devices": count}
    )


_STORAGE = {
    "file": "xxhash", "redis": "redis", "s3": "obstore", "mooncake": "mooncake.store", "nixl": "nixl_cu13._api",
}  # fmt: skip
"""Storage backend -> the module that it needs besides the checksum."""
_CHECKSUM = "xxhash"


def _page_hashes(machine: Machine) -> Finding:
    provider = machine.sha256_provider()
    data = {"provider": provider, "native": provider != "hashlib"}
    if not data["native"]:
        value = "SHA-256 by hashlib, a page at a time under the GIL: no libcrypto of OpenSSL 1.1 or 3 is found"
        return Finding("page hashes", "missing", value, data, brief="no libcrypto")
    return Finding("page hashes", "ok", f"SHA-256 by libcrypto: {provider}, native", data)


def _checksums(machine: Machine) -> Finding:
    """Of what is stored. The package is compiled, or it does not load."""
    lacking = _lacking(machine, _CHECKSUM, "storage")
    if lacking:
        return Finding("checksums", "missing", lacking, {"native": False}, brief="no xxhash")
    xxhash = machine.load(_CHECKSUM)
    version = f"xxhash {_version(xxhash, 'VERSION')} over libxxhash {_version(xxhash, 'XXHASH_VERSION')}, native"
    return Finding("checksums", "ok", version, {"native": True})


def _backend(machine: Machine, name: str) -> Finding:
    """Whether a storage backend has its packages. Whether a server answers is not asked."""
    lacking = _lacking(machine, _CHECKSUM, "storage") or _lacking(machine, _STORAGE[name], name)
    if lacking:
        return Finding(_storage_name(name), "missing", lacking, {"installed": False})
    return Finding(_storage_name(name), "ok", _package(machine, name), {"installed": True})


def _package(machine: Machine, backend: str) -> str:
    """What moves a backend's bytes."""
    package, module = _STORAGE[backend].partition(".")[0], machine.load(_STORAGE[backend])
    if package == _CHECKSUM:
        return "built in"
    shown = f"{package} {_version(module, '__version__')}".strip()
    return f"{shown}, {_parser(machine)}" if backend == "redis" else f"{shown}, native"


def _storage_name(backend: str) -> str:
    return f"storage: {backend}"


def _lacking(machine: Machine, module: str, extra: str) -> str:
    """What is wrong with a module, and what installs it; "" if it loads."""
    try:
        machine.load(module)
    except (ImportError, OSError) as error:
        return f"{error}; pip install 'radixkv[{extra}]'"
    return ""


def _parser(machine: Machine) -> str:
    try:
        return f"replies parsed by hiredis {_version(machine.load('hiredis'), '__version__')}, native"
    except ImportError:
        return "replies parsed in Python, slowly: pip install 'radixkv[redis]' for hiredis"


def _version(module: Any, name: str) -> str:
    return str(getattr(module, name, ""))


def _nvrtc(machine: Machine) -> Finding:
    try:
        library = machine.library("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    except OSError as error:
        try:  # CuPy's wheels find the one of the nvidia packages
            major, minor = machine.load("cupy.cuda.nvrtc").getVersion()
        except ImportError:
            return _no_library("nvrtc", "libnvrtc", error)
        return Finding("nvrtc", "ok", f"{major}.{minor}, through CuPy", {"version": f"{major}.{minor}"})
    parts = ctypes.c_int(), ctypes.c_int()
    code = library.nvrtcVersion(*map(ctypes.byref, parts))
    version = ".".join(str(part.value) for part in parts)
    return Finding("nvrtc", "failed" if code else "ok", f"error {code}" if code else version, {"version": version})


def _kernels(machine: Machine) -> Finding:
    path = machine.shipped(FATBIN)
    if path is None:
        return Finding("kernels", "missing", f"no {FATBIN}: built without nvcc; NVRTC compiles them", {"path": None})
    value = f"prebuilt, {path.stat().st_size / 1024:.0f} KiB, {path}"
    return Finding("kernels", "ok", value, {"path": str(path), "bytes": path.stat().st_size})


def _c_launcher(machine: Machine) -> Finding:
    path = machine.shipped(C_LAUNCHER)
    if path is None:
        return Finding("C launcher", "missing", f"no {C_LAUNCHER}: built without nvcc", {"path": None})
    table = ctypes.CDLL(str(path)).rkv_cuda_get_api
    table.restype = ctypes.POINTER(ctypes.c_uint32)
    if not table(C_LAUNCHER_ABI):
        value = f"{path} does not speak ABI version {C_LAUNCHER_ABI}"
        return Finding("C launcher", "failed", value, {"path": str(path)})
    return Finding("C launcher", "ok", f"ABI version {C_LAUNCHER_ABI}, {path}", {"path": str(path)})


def _override(machine: Machine) -> Finding:
    value = machine.environment(ENVIRONMENT)
    shown, data = f"${ENVIRONMENT} is {value!r}", {"override": value}
    if value in ("", "auto"):
        return Finding("transfer path", "ok", f"${ENVIRONMENT} is not set" if not value else shown, {"override": None})
    if value not in get_args(PathName):
        shown += f", and must be auto, {' or '.join(get_args(PathName))}: every GPU transfer will be refused"
        return Finding("transfer path", "failed", shown, data)
    return Finding("transfer path", "ok", shown, data)


def _tuning(machine: Machine) -> Finding:
    try:
        chooser = machine.chooser()
    except (ImportError, RuntimeError) as error:
        return Finding("tuning", "missing", f"no GPU to measure ({error})", {"tuned": False})
    data = {"tuned": chooser.tuned, "path": str(chooser.path), "device": chooser.device}
    if chooser.caches_ignored:
        return Finding("tuning", "failed", f"{chooser.path} cannot be used; GpuTransfer.tune measures anew", data)
    if not chooser.tuned:
        value = f"{chooser.device} has not been measured (GpuTransfer.tune keeps it in {chooser.path})"
        return Finding("tuning", "missing", value, data)
    return Finding("tuning", "ok", f"{chooser.device}, {chooser.path}", data)


def _nvcc(machine: Machine) -> Finding:
    path = machine.which("nvcc")
    if path is None:
        return Finding("nvcc", "missing", "not on the PATH")
    last = [line for line in machine.run(path, "--version").splitlines() if "release" in line]
    version = last[0].partition("release ")[2].partition(",")[0] if last else "of unknown version"
    return Finding("nvcc", "ok", f"{version}, {path}", {"version": version, "path": path})


def _huge_pages(machine: Machine) -> Finding:
    free = host_memory(machine.root).hugetlb_free_bytes
    text = machine.read("sys/kernel/mm/transparent_hugepage/enabled") or ""
    setting = text.partition("[")[2].partition("]")[0] or "absent"
    value = f"{free / _GB:.2f} GB reserved and free, transparent: {setting}"
    status: Status = "ok" if free or setting in ("always", "madvise") else "missing"
    return Finding("huge pages", status, value, {"hugetlb_free_bytes": free, "transparent": setting})


def _memory(machine: Machine) -> Finding:
    memory = host_memory(machine.root)
    limit = memory.cgroup_limit_bytes
    value = f"{memory.available_bytes / _GB:.2f} GB free ({memory.source})"
    value += f", cgroup limit {limit / _GB:.2f} GB" if limit is not None else ", no cgroup limit"
    return Finding("host memory", "ok", value, dict(memory._asdict()))


def _pinned(machine: Machine) -> Finding:
    limit = machine.memlock_bytes()
    shown = "no limit" if limit < 0 else f"limit {limit / _MIB:,.0f} MiB"
    data: dict[str, Any] = {"memlock_bytes": limit, "registrar": None}
    try:
        data["registrar"] = machine.registrar_name()
    except DeviceUnavailableError as error:
        return Finding("page-locking", "missing", f"{error}; mlock: {shown}", data, brief="no CUDA that sees a GPU")
    return Finding("page-locking", "ok", f"through {data['registrar']} (not bound by mlock's {shown})", data)


def _numa(machine: Machine) -> Finding:
    nodes = online_nodes(lambda path: machine.read(str(path).lstrip("/")))
    return Finding("numa", "ok", f"{len(nodes)} node{'s' * (len(nodes) > 1)}", {"nodes": nodes})


def _host_bandwidth(machine: Machine) -> Finding:
    num_bytes = _fitting(machine)
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    one = _best(lambda: np.copyto(target, source), num_bytes)
    threads = min(_MAX_THREADS, machine.cpus())
    step = -(-num_bytes // threads)
    parts = [slice(at, at + step) for at in range(0, num_bytes, step)]
    with ThreadPoolExecutor(threads) as pool:  # numpy releases the GIL

        def all_parts() -> None:
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))

        many = _best(all_parts, num_bytes)
    value = f"memcpy {one:.1f} GB/s on 1 thread, {many:.1f} GB/s on {threads}"
    return Finding("host bandwidth", "ok", value, {"one_thread_gb_per_s": one, "gb_per_s": many, "threads": threads})


def _link_bandwidth(machine: Machine) -> Finding:
    name = "link bandwidth"
    num_bytes = _fitting(machine)
    try:
        torch = machine.load("torch")
        if torch.cuda.device_count():
            host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
            return _link(
                name, num_bytes, lambda: _copy_torch(torch, device, host), lambda: _copy_torch(torch, host, device)
            )
    except ImportError:
        pass  # then CuPy may be there
    try:
        cupy = machine.load("cupy")
        count = cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError) as error:
        return Finding(name, "missing", f"no GPU to measure ({error})")
    if not count:
        return Finding(name, "missing", "no GPU to measure")
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(num_bytes), np.uint8, num_bytes)
    array = cupy.empty(num_bytes, np.uint8)
    return _link(name, num_bytes, lambda: array.set(pinned), lambda: array.get(out=pinned))


def _copy_torch(torch: Any, target: Any, source: Any) -> None:
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def _link(name: str, num_bytes: int, load: Callable[[], Any], back: Callable[[], Any]) -> Finding:
    to_device, to_host = _best(load, num_bytes), _best(back, num_bytes)
    value = f"host to device {to_device:.1f} GB/s, device to host {to_host:.1f} GB/s"
    return Finding(name, "ok", value, {"host_to_device_gb_per_s": to_device, "device_to_host_gb_per_s": to_host})


def _fitting(machine: Machine) -> int:
    """Bytes to copy: less where memory is short."""
    return max(_MIB, min(_COPY_BYTES, host_memory(machine.root).available_bytes // 8))


def _best(copy: Callable[[], Any], num_bytes: int) -> float:
    """GB/s of the fastest of a few copies; the first one, which touches the memory, does not count."""
    copy()
    times = []
    for _ in range(_COPIES):
        begin = time.perf_counter()
        copy()
        times.append(time.perf_counter() - begin)
    return num_bytes / max(min(times), 1e-9) / _GB


Probe = Callable[[Machine], Finding]
PROBES: dict[str, Probe] = {
    "cpu": _cpu, "host memory": _memory, "huge pages": _huge_pages, "numa": _numa, "gpu": _gpu, "driver": _driver,
    "torch": _torch, "cupy": _cupy, "nvrtc": _nvrtc, "nvcc": _nvcc, "kernels": _kernels, "C launcher": _c_launcher,
    "transfer path": _override, "tuning": _tuning, "page-locking": _pinned,
    "page hashes": _page_hashes, "checksums": _checksums,
    **{_storage_name(name): partial(_backend, name=name) for name in _STORAGE},
}  # fmt: skip
MEASUREMENTS: dict[str, Probe] = {"host bandwidth": _host_bandwidth, "link bandwidth": _link_bandwidth}


def _isolated(name: str, probe: Probe, machine: Machine) -> Finding:
    """A finding, whatever the probe does."""
    try:
        return probe(machine)
    except Exception as error:  # a broken driver or package can raise anything: it is a finding
        return Finding(name, "failed", f"{type(error).__name__}: {error}")


# ---- what follows ----------------------------------------------------------------------------------------------------
def decide(findings: Iterable[Finding]) -> list[Choice]:
    """What radixkv will use, given these findings. Pure."""
    found = {finding.name: finding for finding in findings}

    def data(name: str, key: str, default: Any = 0) -> Any:
        return found[name].data.get(key, default) if name in found else default

    def why(*names: str) -> str:
        return "; ".join(
            f"{name}: {found[name].brief or found[name].value}"
            for name in names
            if name in found and found[name].status != "ok"
        )

    return [_copies(data, why), _device_pools(data, why), *_host_pools(data, why), _backends(data)]


def _backends(data: Any) -> Choice:
    installed = [name for name in _STORAGE if data(_storage_name(name), "installed", False)]
    lacking = [name for name in _STORAGE if name not in installed]
    reasons = ["their packages load; no server was asked"] * bool(installed)
    reasons += [f"not {', '.join(lacking)}"] * bool(lacking)
    return Choice("storage", ", ".join([*installed, "memory"]), "; ".join(reasons))


def _copies(data: Any, why: Any) -> Choice:
    if not data("cupy", "devices"):
        reason = why("gpu", "driver", "cupy") or "CuPy sees no GPU"
        if data("torch", "devices"):
            reason = f"torch sees a GPU, but nothing copies to it without CuPy: {reason}"
        return Choice("copies", "the CPU path", reason)
    override = data("transfer path", "override", None)
    if override and override not in get_args(PathName):
        return Choice("copies", "the CPU path", why("transfer path"))
    prebuilt, nvrtc = data("kernels", "path", None), data("nvrtc", "version", None)
    if not prebuilt and not nvrtc:
        return Choice("copies", "the copy engine through CuPy", f"kernels cannot be compiled here: {why('nvrtc')}")
    kernels = "prebuilt kernels" if prebuilt else f"NVRTC {nvrtc}"
    if override:
        name = "CUDA kernels" if override == "kernel" else "the copy engine"
        return Choice("copies", f"{name} through CuPy", f"${ENVIRONMENT} is {override!r}; {kernels}")
    measured = "measured on this device" if data("tuning", "tuned", False) else "by default figures, untuned"
    return Choice("copies", "CUDA kernels and the copy engine through CuPy", f"{kernels}; chosen {measured}")


def _device_pools(data: Any, why: Any) -> Choice:
    if data("torch", "devices") and not data("cupy", "devices"):
        reason = why("cupy") or "CuPy sees no GPU"
        return Choice("device pools", "torch tensors in host memory", f"copies to and from a GPU need CuPy: {reason}")
    if data("torch", "devices"):
        return Choice("device pools", "torch tensors on the GPU", "torch sees a GPU")
    if data("cupy", "devices"):
        return Choice("device pools", "CuPy arrays on the GPU", why("torch") or "torch sees no GPU")
    if data("torch", "version", None):
        return Choice("device pools", "torch tensors in host memory", why("gpu", "driver") or "torch sees no GPU")
    return Choice("device pools", "numpy arrays in host memory", why("torch", "gpu"))


def _host_pools(data: Any, why: Any) -> list[Choice]:
    reserved, setting = data("huge pages", "hugetlb_free_bytes"), data("huge pages", "transparent", "absent")
    if reserved:
        pages = Choice("host memory", "reserved huge pages", f"{reserved / _GB:.2f} GB; a larger pool takes others")
    elif setting in ("always", "madvise"):
        pages = Choice("host memory", "transparent huge pages", "no reserved ones are free (vm.nr_hugepages)")
    else:
        pages = Choice("host memory", "plain pages", f"no reserved huge pages are free, transparent: {setting}")
    usable = max(0, data("host memory", "available_bytes") - DEFAULT_HEADROOM_BYTES)
    reason = f"{data('host memory', 'source', 'unknown')}, less {DEFAULT_HEADROOM_BYTES / _GB:.1f} GB of headroom"
    size = Choice("host pool size", f"at most {usable / _GB:.2f} GB", reason)
    name = data("page-locking", "registrar", None)
    pin = Choice("page-locking", f"{name}, in chunks of at most 64 GiB" if name else "none",
                 "pools beside a GPU" if name else why("page-locking") or "no GPU")  # fmt: skip
    nodes = data("numa", "nodes", [0])
    several = len(nodes) > 1
    numa = Choice("numa", "the node that is asked for" if several else "nothing", f"{len(nodes)} node{'s' * several}")
    return [pages, size, pin, numa]


def diagnose(machine: Machine | None = None, measure: bool = True) -> Diagnosis:
    """Run every probe. Never raises for what the machine lacks.

    Args: measure: copy some hundred megabytes for the bandwidths (about a second).
    """
    machine = machine or Machine()
    probes = PROBES | (MEASUREMENTS if measure else {})
    findings = [_isolated(name, probe, machine) for name, probe in probes.items()]
    return Diagnosis(findings, decide(findings))


# ---- output ----------------------------------------------------------------------------------------------------------
def text(diagnosis: Diagnosis) -> str:
    """Plain lines, for where rich is not installed."""
    lines = [f"{f.name:15} {f.status:8} {f.value}" for f in diagnosis.findings]
    lines += ["", *(f"{c.purpose:15} {c.uses} ({c.reason})" for c in diagnosis.choices)]
    return "\n".join(lines)


def tables(diagnosis: Diagnosis) -> list[Any]:
    """Two rich tables. Raises: ImportError without rich."""
    box, table = importlib.import_module("rich.box"), importlib.import_module("rich.table")
    escape = importlib.import_module("rich.markup").escape
    colours = {"ok": "green", "missing": "yellow", "failed": "red"}
    offers = table.Table(title="this machine", title_justify="left", box=box.SIMPLE_HEAD)
    uses = table.Table(title="radixkv will use", title_justify="left", box=box.SIMPLE_HEAD)
    heads = ((offers, ("", "status", "what there is")), (uses, ("for", "uses", "because")))
    for one, name in ((one, name) for one, names in heads for name in names):
        one.add_column(name, overflow="fold")  # a path is copied: it must be whole
    for f in diagnosis.findings:
        offers.add_row(f.name, f"[{colours[f.status]}]{f.status}[/]", escape(f.value))
    for c in diagnosis.choices:
        uses.add_row(c.purpose, escape(c.uses), escape(c.reason))
    return [offers, uses]
