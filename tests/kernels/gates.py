"""What the compilers make of the kernels: resources from ptxas, instructions from nvdisasm, and NVRTC without a driver.

    python -m tests.kernels.gates        records the registers of this nvcc in registers.json, beside those of others

nvcc: $RKV_NVCC, else the one on PATH, else that of NVIDIA's PyPI packages (pip install radixkv[gates]).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .simulator import KERNELS, ROOT

ARCHS = ("sm_80", "sm_90", "sm_100")
RECORD = Path(__file__).with_name("registers.json")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel, as ptxas -v reports them. Bytes, but for registers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def packaged(pattern: str) -> list[Path]:
    """Files of NVIDIA's PyPI packages (nvidia-cuda-nvdisasm, nvidia-cuda-nvrtc): installed, or in build/cuda-tools."""
    spec = importlib.util.find_spec("nvidia")
    folders = [*(spec.submodule_search_locations or [] if spec else []), ROOT / "build" / "cuda-tools" / "nvidia"]
    return sorted(found for folder in folders for found in Path(folder).glob(pattern))


def find_nvdisasm() -> Path | None:
    on_path = shutil.which("nvdisasm")
    return next(iter([Path(on_path)] if on_path else packaged("*/bin/nvdisasm")), None)


@functools.cache
def find_nvcc() -> Path | None:
    named = os.environ.get("RKV_NVCC") or shutil.which("nvcc")
    return next(iter([Path(named)] if named else packaged("*/bin/nvcc")), None)


def nvcc_release() -> str | None:
    """ "13.0", or None without an nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    assert found is not None, said
    return found[1]


def compile_cubin(arch: str, cubin: Path, source: Path = KERNELS / "all.cu") -> dict[str, Resources]:
    """Compile every kernel of a source for one architecture. Returns: what each takes. Fails on any warning."""
    flags = ["-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings"]
    command = [str(find_nvcc()), *flags, f"-I{KERNELS}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    blocks = re.split(r"Compiling entry function '", done.stdout + done.stderr)[1:]
    return {block.split("'")[0]: _resources(block) for block in blocks}


def _resources(block: str) -> Resources:
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
    registers = re.search(r"Used (\d+) registers", block)
    assert memory is not None, block
    assert registers is not None, block
    return Resources(int(registers[1]), int(memory[1]), int(memory[2]), int(memory[3]))


def disassemble(cubin: Path) -> dict[str, list[str]]:
    """Kernel, then the instructions in order, with their modifiers ("LDG.E.NA.128.CONSTANT").

    A call of a subroutine (a 64-bit division, say) is "CALL". ptxas also writes CALL.REL.NOINC for a jump to a label of
    its own kernel, from which nothing returns: that is "JUMP".
    """
    nvdisasm = find_nvdisasm()
    assert nvdisasm is not None
    text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\w+):\n", text, flags=re.MULTILINE)
    opcode = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    jump = re.compile(r"CALL\.REL\.NOINC (?=`\(\.L_x_\d+\))")
    return {name: opcode.findall(jump.sub("JUMP ", body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def compile_with_nvrtc(library: Path, source: str, arch: str) -> bytes:
    """A cubin by NVRTC through ctypes, as CuPy compiles: one string, no include folder, no driver."""
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def call(name: str, *arguments: object) -> None:
        status = getattr(nvrtc, name)(*arguments)
        if status:
            raise AssertionError(f"{name}: {nvrtc.nvrtcGetErrorString(status).decode()}\n{log()}")

    def log() -> str:
        size = ctypes.c_size_t()
        if not program or nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)):
            return ""
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.value.decode()

    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"radixkv.cu", 0, None, None)
    options = [f"--gpu-architecture={arch}".encode(), b"-std=c++17"]
    call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    call("nvrtcGetCUBINSize", program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    call("nvrtcGetCUBIN", program, cubin)
    call("nvrtcDestroyProgram", ctypes.byref(program))
    return cubin.raw


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        registers = {
            arch: {name: found.registers for name, found in sorted(compile_cubin(arch, Path(folder) / "all").items())}
            for arch in ARCHS
        }
    recorded = json.loads(RECORD.read_text()) | {nvcc_release(): registers}
    RECORD.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
