"""tools/gpu.py where there is no GPU: what it would run exists, and what it finds missing it names."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from . import backends
from .simulator import ROOT


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_runs_what_there_is(gpu: ModuleType, tmp_path: Path) -> None:
    for step in gpu.STEPS:
        for command, _ in gpu.commands(step, True, tmp_path):
            assert sys.executable in command
            if "-m" in command:
                assert importlib.util.find_spec(command[command.index("-m") + 1]) is not None
            files = [word for word in command if word.endswith(".py") or word.startswith("tests/")]
            assert [name for name in files if not (ROOT / name).exists()] == []


def test_a_run_keeps_status_and_last_lines(gpu: ModuleType) -> None:
    said = gpu.run([sys.executable, "-c", "for i in range(100): print(i)\nraise SystemExit(3)"], {})
    assert said["exit_status"] == 3
    assert said["tail"] == [str(i) for i in range(60, 100)]
    absent = gpu.run(["no-such-program"], {})
    assert absent["exit_status"] is None
    assert "no-such-program" in absent["tail"][0]


def test_the_result_names_device_driver_date_and_commit(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(step: str, quick: bool, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
        write = f"open({str(folder / 'bench.json')!r}, 'w').write('[1]')"
        return [([sys.executable, "-c", write if step == "bench" else "raise SystemExit(1)"], {})]

    monkeypatch.setattr(gpu, "NEEDED", ("numpy",))
    monkeypatch.setattr(gpu, "device", lambda: ("Fake GPU", "580.1"))
    monkeypatch.setattr(gpu, "commands", commands)
    monkeypatch.setenv("RADIXKV_COMMIT", "abc")
    for steps, status in (("bench", 0), ("tests,bench", 1)):
        result = tmp_path / f"{status}.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--steps", steps, "--json", str(result)])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert ended.value.code == status
        found = json.loads(result.read_text())
        assert (found["device"], found["driver"], found["commit"], found["bench"]) == ("Fake GPU", "580.1", "abc", [1])
        assert found["date"].endswith("Z")
        assert list(found["steps"]) == steps.split(",")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--steps", "bench"])
    with pytest.raises(SystemExit):
        gpu.main()
    [written] = (tmp_path / "out").iterdir()
    assert written.name.startswith("gpu-Fake-GPU-20")


def test_a_step_that_takes_too_long_is_stopped_with_its_children(gpu: ModuleType, tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    said = gpu.run([sys.executable, "-c", f"{code}; print('begun', flush=True); time.sleep(60)"], {}, 1.0)
    assert said["seconds"] < 30, "the child holds the pipe, too"
    assert (said["exit_status"], said["stopped_after_s"]) == (-signal.SIGKILL, 1.0)


def test_a_budget_leaves_out_what_does_not_fit(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("numpy",))
    monkeypatch.setattr(gpu, "device", lambda: ("Fake GPU", "580.1"))
    monkeypatch.setattr(gpu, "commands", lambda *_: [([sys.executable, "-c", "pass"], {})])
    result = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--steps", "bench", "--budget", "0", "--json", str(result)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert json.loads(result.read_text())["steps"]["bench"][0]["tail"] == ["no time was left"]


def test_without_pytest_the_rest_runs(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("numpy",))
    for step in ("tests", "paths", "nvrtc", "demo"):
        monkeypatch.setitem(gpu.NEEDS, step, ("no_such_pytest",))
    monkeypatch.setattr(gpu, "TO_BUILD", {"no_such_cython": 3})
    monkeypatch.setattr(gpu, "device", lambda: ("Fake GPU", "580.1"))
    monkeypatch.setattr(gpu, "commands", lambda *_: [([sys.executable, "-c", "pass"], {})])
    result = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(result)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    found = json.loads(result.read_text())
    assert ended.value.code == 0
    assert list(found["steps"]) == ["checks", "stack", "cache", "overlap", "sanitizer", "bench"]
    assert found["not_run"]["tests"] == "no no_such_pytest"
    assert "has been built before" in found["not_run"]["build"]
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="not built for it: bring a folder of wheels"):
        gpu.main()


def test_wheels_bring_what_is_missing(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, check: asked.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    gpu.add_wheels(tmp_path, tmp_path / "site")
    assert not asked
    (tmp_path / "x-1-py3-none-any.whl").touch()
    gpu.add_wheels(tmp_path, tmp_path / "site")
    assert asked[0][-1].endswith("x-1-py3-none-any.whl")
    assert "--no-index" in asked[0]
    assert sys.path[0] == str(tmp_path / "site")
    assert os.environ["PYTHONPATH"] == f"{tmp_path / 'site'}{os.pathsep}before"
    assert gpu.unfit_to_build() == []
    monkeypatch.setattr(gpu, "TO_BUILD", {"numpy": 99, "no_such_module": 1})
    assert gpu.unfit_to_build() == ["no_such_module", "numpy>=99"]


def test_figures_of_several_commands_of_a_step(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(step: str, quick: bool, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
        written = [(name, folder / f"{step}-{name}.json") for name in ("kernel", "engine")]
        return [([sys.executable, "-c", f"open({str(path)!r}, 'w').write('[0]')"], {}) for _, path in written]

    monkeypatch.setattr(gpu, "NEEDED", ("numpy",))
    monkeypatch.setattr(gpu, "device", lambda: ("Fake GPU", "580.1"))
    monkeypatch.setattr(gpu, "commands", commands)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--steps", "stack", "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert json.loads((tmp_path / "r.json").read_text())["stack"] == {"kernel": [0], "engine": [0]}


def test_what_is_missing_is_named(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu, "NEEDED", ("numpy", "no_such_module"))
    with pytest.raises(SystemExit, match="has no no_such_module"):
        gpu.main()
    monkeypatch.setattr(gpu, "NEEDED", ("numpy",))
    monkeypatch.setattr(gpu, "first_line", lambda command: None)
    with pytest.raises(SystemExit, match="there is no GPU"):
        gpu.main()


def test_a_required_gpu_that_is_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_cuda", lambda: "no GPU here")
    monkeypatch.setenv("RADIXKV_REQUIRE_GPU", "1")
    with pytest.raises(pytest.fail.Exception, match="RADIXKV_REQUIRE_GPU=1, and no GPU here"):
        backends.backend("cuda")
    monkeypatch.delenv("RADIXKV_REQUIRE_GPU")
    with pytest.raises(pytest.skip.Exception, match="no GPU here"):
        backends.backend("cuda")


def test_help_needs_nothing() -> None:
    command = [sys.executable, ROOT / "tools" / "gpu.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "compute-sanitizer" in done.stdout
