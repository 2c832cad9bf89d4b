"""Each host of csrc/examples builds in its own language's way, runs, and prints what it should."""

from __future__ import annotations

from pathlib import Path

import radixkv

from .toolchain import EXAMPLES, INCLUDE, STRICT, library, run, tool

TREE = "8 tokens shared, 2 duplicates, 8 evicted under a lock"
REFUSED = "unlock twice: lock count violated, index: 2 pages"


def _pkg_config(*what: str) -> list[str]:
    return run([tool("pkg-config"), *what, "radixkv"], env=_pkg_config_path()).stdout.split()


def _pkg_config_path() -> dict[str, str]:
    return {"PKG_CONFIG_PATH": str(library().parent / "pkgconfig")}


def _said(program: Path, *arguments: Path, env: dict[str, str] | None = None) -> str:
    done = run([program, *arguments], env=env)
    assert done.stderr == ""
    return done.stdout.strip()


def test_c_links_through_pkg_config(tmp_path: Path) -> None:
    program = tmp_path / "host"
    flags = ["-std=c99", *STRICT, *_pkg_config("--cflags")]
    run(
        [
            tool("gcc"),
            *flags,
            EXAMPLES / "host.c",
            *_pkg_config("--libs"),
            f"-Wl,-rpath,{library().parent}",
            "-o",
            program,
        ]
    )
    assert _said(program) == f"radixkv {radixkv.__version__} from C: {TREE}, 16 after, 12 events, index: 3 and 2 pages"


def test_c_loads_the_table_at_run_time(tmp_path: Path) -> None:
    program = tmp_path / "host"
    run([tool("gcc"), "-std=c99", *STRICT, f"-I{INCLUDE}", EXAMPLES / "host_dlopen.c", "-ldl", "-o", program])
    assert _said(program, library()) == f"radixkv {radixkv.__version__} from dlopen: {TREE}, {REFUSED}"


def test_cpp_wraps_the_handles(tmp_path: Path) -> None:
    program = tmp_path / "host"
    flags = ["-std=c++17", *STRICT, *_pkg_config("--cflags")]
    run(
        [
            tool("g++"),
            *flags,
            EXAMPLES / "host.cpp",
            *_pkg_config("--libs"),
            f"-Wl,-rpath,{library().parent}",
            "-o",
            program,
        ]
    )
    assert _said(program) == f"radixkv {radixkv.__version__} from C++: {TREE}, {REFUSED}"


def test_rust_links_with_std_alone(tmp_path: Path) -> None:
    program = tmp_path / "host"
    link = [f"-Clink-arg={library()}", f"-Clink-arg=-Wl,-rpath,{library().parent}"]
    run(
        [tool("rustc"), "--edition", "2021", "-D", "warnings", EXAMPLES / "host.rs", *link, "-o", program], cwd=tmp_path
    )
    assert _said(program) == f"radixkv {radixkv.__version__} from Rust: {TREE}, {REFUSED}"


def test_go_links_through_cgo(tmp_path: Path) -> None:
    tool("pkg-config")
    program = tmp_path / "host"
    env = _pkg_config_path() | {"GOCACHE": str(tmp_path / "cache"), "GOPROXY": "off", "CGO_ENABLED": "1"}
    run([tool("go"), "build", "-o", program, EXAMPLES / "host.go"], env=env, cwd=tmp_path)
    said = _said(program, env={"LD_LIBRARY_PATH": str(library().parent)})
    assert said == f"radixkv {radixkv.__version__} from Go: {TREE}, {REFUSED}"
