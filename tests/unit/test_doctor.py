"""radixkv doctor: every machine is described, whatever it lacks; the choices follow from the findings."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radixkv import cli, doctor
from radixkv.doctor import Choice, Diagnosis, Finding, Machine, decide, diagnose
from radixkv.errors import DeviceUnavailableError
from radixkv.transfer.choose import Chooser
from radixkv.transfer.cuda import FATBIN
from radixkv.tree.page_hash import sha256_provider

ROOT = Path(__file__).parents[2]
GIB = 1024**3


class Bare(Machine):
    """A machine with nothing but memory."""

    def __init__(self, root: Path, files: dict[str, str] | None = None) -> None:
        self.root = root
        for name, value in ({"proc/meminfo": "MemAvailable: 8192 kB\n"} | (files or {})).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(value)
        self.programs: dict[str, str] = {}
        self.modules: dict[str, Any] = {}
        self.libraries: dict[str, Any] = {}
        self.registrar: str | None = None
        self.limit = 8 * 1024**2
        self.variables: dict[str, str] = {}
        self.device: str | None = None
        self.provider = "hashlib"

    def sha256_provider(self) -> str:
        return self.provider

    def which(self, program: str) -> str | None:
        return f"/bin/{program}" if program in self.programs else None

    def run(self, *command: str) -> str:
        return self.programs[command[0].removeprefix("/bin/")]

    def load(self, module: str) -> Any:
        if module not in self.modules:
            raise ImportError(f"No module named {module!r}")
        return self.modules[module]

    def library(self, *names: str) -> Any:
        for name in names:
            if name in self.libraries:
                return self.libraries[name]
        raise OSError(f"{names[-1]}: no such file")

    def environment(self, name: str) -> str:
        return self.variables.get(name, "")

    def shipped(self, name: str) -> Path | None:
        path = self.root / "lib" / name
        return path if path.exists() else None

    def chooser(self) -> Chooser:
        if self.device is None:
            raise ImportError("No module named 'cupy'")
        return Chooser(self.device, folder=self.root / "cache", override="kernel")

    def memlock_bytes(self) -> int:
        return self.limit

    def registrar_name(self) -> str:
        if self.registrar is None:
            raise DeviceUnavailableError("page-locking needs CUDA")
        return self.registrar

    def cpus(self) -> int:
        return 3


class FakeTensor:
    """Counts the copies that the link's measurement makes."""

    copies: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, place: str) -> None:
        self.place = place

    def copy_(self, source: FakeTensor, non_blocking: bool) -> None:
        assert non_blocking
        FakeTensor.copies.append((source.place, self.place))


def fake_torch(devices: int) -> Any:
    def empty(num_bytes: int, dtype: Any, pin_memory: bool = False, device: str = "cpu") -> FakeTensor:
        assert num_bytes >= 1024**2
        return FakeTensor("pinned" if pin_memory else device)

    return SimpleNamespace(
        __version__="2.9", uint8=np.uint8, empty=empty, version=SimpleNamespace(cuda="13.0" if devices else None),
        cuda=SimpleNamespace(device_count=lambda: devices, synchronize=lambda: None),
    )  # fmt: skip


def fake_cupy(devices: int | Exception) -> Any:
    def count() -> int:
        if isinstance(devices, Exception):
            raise devices
        return devices

    class Array:
        def __init__(self, num_bytes: int, _dtype: Any) -> None:
            self.data = np.zeros(num_bytes, np.uint8)

        def set(self, source: Any) -> None:
            self.data[:] = source

        def get(self, out: Any) -> None:
            out[:] = self.data

    cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count), alloc_pinned_memory=bytearray)
    return SimpleNamespace(__version__="13.6", cuda=cuda, empty=Array)


def fake_library(**functions: Any) -> Any:
    """Functions that store the given values behind their pointers and return the code."""

    def function(code: int, values: tuple[int, ...]) -> Any:
        def call(*pointers: Any) -> int:
            for pointer, value in zip(pointers, values, strict=False):
                pointer._obj.value = value
            return code

        return call

    return SimpleNamespace(**{name: function(code, values) for name, (code, *values) in functions.items()})


def found(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnosis.findings}


def chosen(diagnosis: Diagnosis) -> dict[str, Choice]:
    return {choice.purpose: choice for choice in diagnosis.choices}


# ---- findings --------------------------------------------------------------------------------------------------------
def test_a_machine_with_nothing(tmp_path: Path) -> None:
    diagnosis = diagnose(Bare(tmp_path))
    findings, choices = found(diagnosis), chosen(diagnosis)
    assert set(findings) == set(doctor.PROBES) | set(doctor.MEASUREMENTS)
    missing = {"gpu", "driver", "torch", "cupy", "nvrtc", "nvcc", "huge pages", "page-locking", "link bandwidth",
               "kernels", "C launcher", "tuning", "page hashes", "checksums",
               *(f"storage: {name}" for name in ("file", "redis", "s3", "mooncake", "nixl"))}  # fmt: skip
    assert {name for name, finding in findings.items() if finding.status == "missing"} == missing
    assert not [finding for finding in findings.values() if finding.status == "failed"]
    assert choices["copies"].uses == "the CPU path"
    assert "gpu: no nvidia-smi" in choices["copies"].reason
    assert choices["device pools"].uses == "numpy arrays in host memory"
    assert choices["host memory"].uses == "plain pages"
    assert choices["page-locking"].uses == "none"
    assert choices["host pool size"].uses == "at most 0.00 GB"
    assert choices["numa"].uses == "nothing"
    assert choices["storage"].uses == "memory"
    assert findings["host bandwidth"].data["threads"] == 3
    assert findings["host bandwidth"].data["gb_per_s"] > 0


def equipped(root: Path) -> Bare:
    machine = Bare(root, {
        "proc/meminfo": "MemAvailable: 104857600 kB\nHugePages_Free: 512\nHugepagesize: 2048 kB\n",
        "proc/cpuinfo": "model name : Fast\nflags : fpu avx2 avx512f\n\nmodel name : Fast\nflags : fpu avx2 avx512f\n",
        "proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/memory.max": str(50 * GIB),
        "sys/fs/cgroup/box/memory.current": str(10 * GIB),
        "sys/devices/system/node/online": "0-1\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never",
    })  # fmt: skip
    machine.programs = {
        "nvidia-smi": "H100, 81559 MiB, 9.0\nH100, 81559 MiB, 9.0\n",
        "nvcc": "nvcc: NVIDIA\nCuda compilation tools, release 13.0, V13.0.48\n",
    }
    storage = {
        "xxhash": SimpleNamespace(VERSION="4.1", XXHASH_VERSION="0.8.4"), "redis": SimpleNamespace(__version__="8.1"),
        "hiredis": SimpleNamespace(__version__="3.5"), "obstore": SimpleNamespace(__version__="0.12"),
        "mooncake.store": SimpleNamespace(), "nixl_cu13._api": SimpleNamespace(),
    }  # fmt: skip
    machine.provider = "OpenSSL 3.0"
    machine.modules = {"torch": fake_torch(2), "cupy": fake_cupy(2), **storage}
    machine.libraries = {
        "libcuda.so.1": fake_library(cuDriverGetVersion=(0, 13020), cuInit=(0,), cuDeviceGetCount=(0, 2)),
        "libnvrtc.so.13": fake_library(nvrtcVersion=(0, 13, 1)),
    }
    machine.registrar = "torch"
    machine.limit = -1
    (root / "lib").mkdir()
    (root / "lib" / FATBIN).write_bytes(bytes(4096))
    return machine


@pytest.fixture
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A C launcher that speaks one version of the ABI."""
    from ..abi.toolchain import run, tool

    def build(version: int, root: Path) -> None:
        source = tmp_path_factory.mktemp("launcher") / "launcher.c"
        source.write_text(f"int x; void *rkv_cuda_get_api(unsigned v) {{ return v == {version} ? &x : 0; }}\n")
        run([tool("gcc"), "-shared", "-fPIC", source, "-o", root / "lib" / doctor.C_LAUNCHER])

    return build


def tuned(machine: Bare) -> None:
    """Give it a GPU whose measurement is kept on disk."""
    machine.device = "Fast GPU"
    machine.chooser().tune(lambda *_: 1.0)


def test_storage_backends_and_what_each_of_them_lacks(tmp_path: Path) -> None:
    machine = equipped(tmp_path)
    del machine.modules["mooncake.store"], machine.modules["hiredis"]
    findings = found(diagnose(machine))
    backends = {name: findings[f"storage: {name}"] for name in doctor._STORAGE}
    assert {name: (finding.status, finding.value) for name, finding in backends.items()} == {
        "file": ("ok", "built in"),
        "redis": ("ok", "redis 8.1, replies parsed in Python, slowly: pip install 'radixkv[redis]' for hiredis"),
        "s3": ("ok", "obstore 0.12, native"),
        "mooncake": ("missing", "No module named 'mooncake.store'; pip install 'radixkv[mooncake]'"),
        "nixl": ("ok", "nixl_cu13, native"),
    }
    assert chosen(diagnose(machine))["storage"].uses == "file, redis, s3, nixl, memory"
    assert findings["checksums"].value == "xxhash 4.1 over libxxhash 0.8.4, native"
    del machine.modules["xxhash"]  # which all of them need
    diagnosis = diagnose(machine)
    for name in ("checksums", *(f"storage: {name}" for name in doctor._STORAGE)):
        finding = found(diagnosis)[name]
        assert (finding.status, finding.value) == (
            "missing", "No module named 'xxhash'; pip install 'radixkv[storage]'",
        )  # fmt: skip
    assert chosen(diagnosis)["storage"].uses == "memory"


@pytest.mark.parametrize(("provider", "status", "says"), [
    ("OpenSSL 3.0.19 27 Jan 2026", "ok", "SHA-256 by libcrypto: OpenSSL 3.0.19 27 Jan 2026, native"),
    ("hashlib", "missing", "SHA-256 by hashlib, a page at a time under the GIL"),
])  # fmt: skip
def test_what_hashes_pages(tmp_path: Path, provider: str, status: str, says: str) -> None:
    machine = equipped(tmp_path)
    machine.provider = provider
    finding = found(diagnose(machine, measure=False))["page hashes"]
    assert finding.status == status
    assert finding.value.startswith(says)
    assert finding.data["native"] == (status == "ok")
    assert Machine().sha256_provider() == sha256_provider()


def test_a_machine_with_everything(tmp_path: Path, launcher: Any) -> None:
    FakeTensor.copies.clear()
    machine = equipped(tmp_path)
    launcher(1, tmp_path)
    tuned(machine)
    diagnosis = diagnose(machine)
    findings, choices = found(diagnosis), chosen(diagnosis)
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert findings["gpu"].data == {"count": 2}
    assert findings["gpu"].value.startswith("H100, 81559 MiB, 9.0; ")
    assert findings["driver"].value == "CUDA 13.2, 2 devices"
    assert (findings["nvcc"].data["version"], findings["nvrtc"].data["version"]) == ("13.0", "13.1")
    assert findings["cpu"].data == {"cpus": 3, "extensions": ["avx2", "avx512f"], "model": "Fast"}
    assert findings["huge pages"].data == {"hugetlb_free_bytes": GIB, "transparent": "always"}
    assert findings["host memory"].data["available_bytes"] == 40 * GIB
    assert "cgroup limit 53.69 GB" in findings["host memory"].value
    assert findings["numa"].data == {"nodes": [0, 1]}
    assert "no limit" in findings["page-locking"].value
    assert set(FakeTensor.copies) == {("pinned", "cuda"), ("cuda", "pinned")}
    assert choices["copies"].uses == "CUDA kernels and the copy engine through CuPy"
    assert choices["copies"].reason == "prebuilt kernels; chosen measured on this device"
    assert findings["kernels"].value.startswith("prebuilt, 4 KiB, ")
    assert findings["C launcher"].value.startswith("ABI version 1, ")
    assert findings["tuning"].value.startswith("Fast GPU, ")
    assert choices["device pools"].uses == "torch tensors on the GPU"
    assert choices["host memory"].uses == "reserved huge pages"
    assert choices["page-locking"].uses == "torch, in chunks of at most 64 GiB"
    assert choices["host pool size"].uses == f"at most {30 * GIB / 1e9:.2f} GB"
    assert "cgroup" in choices["host pool size"].reason
    assert choices["numa"].uses == "the node that is asked for"


def test_the_link_is_measured_through_cupy_without_torch(tmp_path: Path) -> None:
    machine = Bare(tmp_path)
    machine.modules = {"cupy": fake_cupy(1)}
    finding = found(diagnose(machine))["link bandwidth"]
    assert finding.status == "ok"
    assert finding.data["host_to_device_gb_per_s"] > 0
    assert finding.data["device_to_host_gb_per_s"] > 0
    machine.modules["cupy"] = fake_cupy(0)
    assert found(diagnose(machine))["link bandwidth"].value == "no GPU to measure"


def test_what_is_there_and_broken_is_told_and_takes_nothing_with_it(tmp_path: Path) -> None:
    machine = equipped(tmp_path)
    machine.modules["cupy"] = fake_cupy(RuntimeError("cudaErrorInsufficientDriver"))
    machine.libraries["libcuda.so.1"].cuInit = lambda _flags: 803
    machine.libraries["libnvrtc.so.13"].nvrtcVersion = lambda *_: 7

    def broken(*_command: str) -> str:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    machine.run = broken  # type: ignore[method-assign]
    diagnosis = diagnose(machine, measure=False)
    findings = found(diagnosis)
    failed = {name for name, finding in findings.items() if finding.status == "failed"}
    assert failed == {"cupy", "driver", "nvrtc", "gpu", "nvcc"}
    assert "cudaErrorInsufficientDriver" in findings["cupy"].value
    assert "does not start: error 803" in findings["driver"].value
    assert findings["gpu"].value.startswith("CalledProcessError: ")
    assert set(findings) == set(doctor.PROBES)
    assert chosen(diagnosis)["copies"].uses == "the CPU path"
    assert "error 803" in chosen(diagnosis)["copies"].reason


@pytest.mark.parametrize("name", [*doctor.PROBES, *doctor.MEASUREMENTS])
def test_each_probe_may_break(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_machine: Machine) -> Finding:
        raise KeyError("surprise")

    monkeypatch.setitem(doctor.PROBES if name in doctor.PROBES else doctor.MEASUREMENTS, name, broken)
    diagnosis = diagnose(Bare(tmp_path))
    assert found(diagnosis)[name] == Finding(name, "failed", "KeyError: 'surprise'")
    assert len(diagnosis.findings) == len(doctor.PROBES) + len(doctor.MEASUREMENTS)
    assert len(diagnosis.choices) == 7


def test_a_launcher_of_another_abi(tmp_path: Path, launcher: Any) -> None:
    machine = equipped(tmp_path)
    launcher(2, tmp_path)
    finding = found(diagnose(machine, measure=False))["C launcher"]
    assert finding.status == "failed"
    assert finding.value.endswith("does not speak ABI version 1")


def test_the_tuning_cache(tmp_path: Path) -> None:
    machine = equipped(tmp_path)
    machine.device = "Fast GPU"
    diagnosis = diagnose(machine, measure=False)
    assert found(diagnosis)["tuning"].status == "missing"
    assert "Fast GPU has not been measured" in found(diagnosis)["tuning"].value
    assert chosen(diagnosis)["copies"].reason == "prebuilt kernels; chosen by default figures, untuned"
    tuned(machine)
    path = machine.chooser().path
    assert found(diagnose(machine, measure=False))["tuning"].data == {
        "tuned": True, "path": str(path), "device": "Fast GPU"}  # fmt: skip
    path.write_text("{")
    finding = found(diagnose(machine, measure=False))["tuning"]
    assert (finding.status, finding.data["tuned"]) == ("failed", False)


@pytest.mark.parametrize(("value", "status", "uses", "reason"), [
    ("auto", "ok", "CUDA kernels and the copy engine through CuPy", "prebuilt kernels; chosen by"),
    ("kernel", "ok", "CUDA kernels through CuPy", "$RADIXKV_TRANSFER is 'kernel'; prebuilt kernels"),
    ("engine", "ok", "the copy engine through CuPy", "$RADIXKV_TRANSFER is 'engine'; prebuilt kernels"),
    ("fast", "failed", "the CPU path", "$RADIXKV_TRANSFER is 'fast', and must be auto, kernel or engine"),
])  # fmt: skip
def test_the_transfer_path_of_the_environment(
    tmp_path: Path, value: str, status: str, uses: str, reason: str
) -> None:
    machine = equipped(tmp_path)
    machine.variables["RADIXKV_TRANSFER"] = value
    diagnosis = diagnose(machine, measure=False)
    assert found(diagnosis)["transfer path"].status == status
    assert chosen(diagnosis)["copies"].uses == uses
    assert reason in chosen(diagnosis)["copies"].reason


def test_torch_on_a_gpu_without_cupy_gets_no_pool_that_nothing_can_copy(tmp_path: Path) -> None:
    machine = equipped(tmp_path)
    del machine.modules["cupy"]
    choices = chosen(diagnose(machine, measure=False))
    assert choices["copies"].uses == "the CPU path"
    assert "torch sees a GPU, but nothing copies to it without CuPy: cupy: No module" in choices["copies"].reason
    assert choices["device pools"].uses == "torch tensors in host memory"
    assert "copies to and from a GPU need CuPy: cupy: No module" in choices["device pools"].reason


def test_nvrtc_of_the_wheels_is_found_through_cupy(tmp_path: Path) -> None:
    machine = Bare(tmp_path)
    machine.modules["cupy.cuda.nvrtc"] = SimpleNamespace(getVersion=lambda: (12, 9))
    finding = found(diagnose(machine, measure=False))["nvrtc"]
    assert (finding.status, finding.value) == ("ok", "12.9, through CuPy")


# ---- choices ---------------------------------------------------------------------------------------------------------
def ok(name: str, **data: Any) -> Finding:
    return Finding(name, "ok", f"{name} is fine", data)


def missing(name: str) -> Finding:
    return Finding(name, "missing", f"no {name}", {})


CUPY, TORCH = ok("cupy", devices=1), ok("torch", devices=0, version="2")
NVRTC = ok("nvrtc", version="13.1")
KERNELS, ENGINE = "CUDA kernels and the copy engine through CuPy", "the copy engine through CuPy"


def huge(setting: str) -> Finding:
    return ok("huge pages", hugetlb_free_bytes=0, transparent=setting)


@pytest.mark.parametrize(("findings", "purpose", "uses", "reason"), [
    ([CUPY, missing("nvrtc")], "copies", ENGINE, "nvrtc: no nvrtc"),
    ([CUPY, NVRTC], "copies", KERNELS, "NVRTC 13.1"),
    ([CUPY, missing("nvrtc"), ok("kernels", path="x")], "copies", KERNELS, "prebuilt kernels"),
    ([ok("torch", devices=1), ok("cupy", devices=0)], "device pools", "torch tensors in host memory", "sees no GPU"),
    ([ok("torch", devices=1), CUPY], "device pools", "torch tensors on the GPU", "torch sees a GPU"),
    ([ok("cupy", devices=0), ok("gpu", count=0)], "copies", "the CPU path", "CuPy sees no GPU"),
    ([missing("gpu"), missing("cupy")], "copies", "the CPU path", "gpu: no gpu; cupy: no cupy"),
    ([missing("torch"), CUPY], "device pools", "CuPy arrays on the GPU", "torch: no torch"),
    ([TORCH, CUPY], "device pools", "CuPy arrays on the GPU", "torch sees no GPU"),
    ([TORCH, missing("gpu")], "device pools", "torch tensors in host memory", "gpu: no gpu"),
    ([huge("madvise")], "host memory", "transparent huge pages", "nr_hugepages"),
    ([huge("never")], "host memory", "plain pages", "transparent: never"),
    ([], "page-locking", "none", "no GPU"), ([], "host pool size", "at most 0.00 GB", "unknown"),
])  # fmt: skip
def test_choices_follow_from_findings(findings: list[Finding], purpose: str, uses: str, reason: str) -> None:
    choice = {choice.purpose: choice for choice in decide(findings)}[purpose]
    assert choice.uses == uses
    assert reason in choice.reason


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "Machine", lambda: Bare(tmp_path / "root"))


@pytest.mark.usefixtures("bare")
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no-bandwidth"]) == 0
    out = capsys.readouterr().out
    for name in (*doctor.PROBES, "radixkv will use", "the CPU path", "no nvidia-smi"):
        assert name in out
    assert "bandwidth" not in out


@pytest.mark.usefixtures("bare")
def test_json_to_standard_output_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no-bandwidth", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"radixkv", "findings", "will_use"}
    assert report["will_use"][0]["uses"] == "the CPU path"
    assert cli.main(["doctor", "--no-bandwidth", "--json", str(tmp_path / "doctor.json")]) == 0
    assert json.loads((tmp_path / "doctor.json").read_text()) == report
    assert "radixkv will use" in capsys.readouterr().out
    assert cli.main(["doctor", "--json", str(tmp_path / "no" / "where.json")]) == 2


def test_square_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich.console")
    finding = Finding("cupy", "missing", "pip install 'radixkv[cuda12]'")
    for table in doctor.tables(Diagnosis([finding], [Choice("copies", "the [CPU] path", "[why]")])):
        rich.Console(width=120).print(table)
    out = capsys.readouterr().out
    for shown in ("radixkv[cuda12]", "the [CPU] path", "[why]"):
        assert shown in out


def test_nothing_is_cut_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich.console", reason="no rich, no tables")
    path = "/" + "/".join(["a_long_folder_name"] * 8) + "/radixkv_kernels.fatbin"
    diagnosis = Diagnosis([Finding("kernels", "ok", f"prebuilt, {path}")], [Choice("copies", "kernels", path)])
    for table in doctor.tables(diagnosis):
        rich.Console(width=80).print(table)
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert "".join(out.split()).count(path) == 2


def test_reasons_do_not_repeat_what_the_loader_said(tmp_path: Path) -> None:
    machine = Bare(tmp_path)
    machine.library = lambda *names: ctypes.CDLL(f"{names[0]}.is.not.there")  # type: ignore[method-assign]
    diagnosis = diagnose(machine, measure=False)
    findings = found(diagnosis)
    assert findings["driver"].value.count("libcuda.so.1") == 1
    assert "cannot open shared object" in findings["driver"].value
    reasons = " ".join(choice.reason for choice in diagnosis.choices)
    assert "driver: no libcuda.so.1" in reasons
    assert "cannot open" not in reasons
    assert chosen(diagnosis)["page-locking"].reason == "page-locking: no CUDA that sees a GPU"


@pytest.mark.parametrize("module", ["radixkv", "radixkv.cli"])
def test_both_modules_are_the_command(module: str) -> None:
    command = [sys.executable, "-m", module, "doctor", "--no-bandwidth", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["will_use"]


def test_the_command_runs_here_with_nothing_installed() -> None:
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "cupy", "rich", "matplotlib"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from radixkv.cli import main
sys.exit(main(["doctor", "--no-bandwidth"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch is blocked" in done.stdout
    assert "numpy arrays in host memory" in done.stdout or "on the GPU" in done.stdout


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RADIXKV_TRANSFER", raising=False)
    diagnosis = diagnose(measure=False)
    findings = found(diagnosis)
    assert findings["transfer path"].value == "$RADIXKV_TRANSFER is not set"
    assert findings["C launcher"].status in ("ok", "missing")
    assert findings["kernels"].status in ("ok", "missing")
    assert not [f for f in findings.values() if "NameError" in f.value or "AttributeError" in f.value]
    assert findings["cpu"].data["cpus"] >= 1
    assert findings["host memory"].data["available_bytes"] > 0
    assert "failed" not in {findings[name].status for name in ("cpu", "host memory", "huge pages", "numa")}
    json.dumps(diagnosis.as_dict())
