"""Builds csrc/hostsim with the kernels in it, once a flavour and version of the sources, and launches plans on it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

from radixkv.transfer.launch import Addresses, Family, Launch, common_ids, first_of_run, launches_of
from radixkv.transfer.plan import CopyPlan

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
HOSTSIM = ROOT / "csrc" / "hostsim"
BUILD = ROOT / "build" / "hostsim"

LOOP, FIBRE, THREAD = range(3)
FLAVOURS = {
    "plain": ["-O2"],
    "quick": ["-O0"],
    "asan": ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
    "gcov": ["-O0", "--coverage"],
}
COMMON = ["-std=c++20", "-shared", "-fPIC", "-pthread", "-DRKV_HOST_SIM", "-Wall", "-Wextra", "-Werror"]
COMMON += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]


def build(flavour: str = "plain", kernels: Path = KERNELS, folder: Path = BUILD) -> Path:
    """The simulator with the kernels of a folder; compiled unless the same sources were."""
    from ..abi.toolchain import tool  # needs pytest, which a machine with a GPU may not have

    compiler = tool("g++")
    sources = sorted([*kernels.glob("*.cu"), *kernels.glob("*.cuh"), *kernels.glob("*.h"), *HOSTSIM.iterdir()])
    digest = hashlib.sha256("\0".join([*FLAVOURS[flavour], *COMMON]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = folder / f"libhostsim-{flavour}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # gcov writes beside the object: it must keep its name
    fresh = library if flavour == "gcov" else library.with_suffix(f".{os.getpid()}")
    command = [compiler, *COMMON, *FLAVOURS[flavour], f"-I{HOSTSIM}", f"-I{kernels}", str(HOSTSIM / "hostsim.cpp")]
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"
    fresh.replace(library)
    return library


class Simulator:
    """Runs launches in one of the simulator's modes; views and tables are plain host memory."""

    def __init__(self, library: Path, mode: int | None = None, seed: int = 0, block: int | None = None) -> None:
        """mode None: LOOP, and FIBRE for kernels with a barrier. block: threads a block, where the launch has more."""
        self._library = ctypes.CDLL(str(library))
        self._launch = self._library.rkv_sim_launch
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = (
            ctypes.c_char_p,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            ctypes.c_uint,
        )
        self._mode, self._seed, self._block = mode, seed, block

    def run(
        self, plan: CopyPlan, *, family: Family = "auto", ctas: int = 4, vector_bytes: int | None = None
    ) -> list[Launch]:
        """Do a plan; returns the launches that it took. Fails on anything that the simulator objects to."""
        launches = launches_of(plan, family=family, ctas=ctas, vector_bytes=vector_bytes)
        src_ids, dst_ids = common_ids(plan)
        addresses = Addresses(
            src_bases=plan.src.bases.ctypes.data,
            dst_bases=plan.dst.bases.ctypes.data,
            src_pages=src_ids.ctypes.data if first_of_run(src_ids) is None else 0,
            dst_pages=dst_ids.ctypes.data if first_of_run(dst_ids) is None else 0,
        )
        for launch in launches:
            self.launch(launch, launch.bind(addresses))
        return launches

    def launch(self, launch: Launch, params: ctypes.Structure) -> None:
        """One launch with bound parameters."""
        staged = launch.kernel.startswith("rkv_relayout")
        mode = self._mode if self._mode is not None else (FIBRE if staged else LOOP)
        args = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        block = min(self._block or launch.block, launch.block)
        said = self._launch(launch.kernel.encode(), launch.grid, block, args, mode, self._seed)
        assert said is None, f"{launch.kernel}: {said.decode()}"


@functools.cache
def plain() -> Simulator:
    return Simulator(build())
