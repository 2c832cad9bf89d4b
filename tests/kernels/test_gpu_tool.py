"""tools/gpu.py where there is no GPU: what it would run exists, and what it finds missing it names."""

from __future__ import annotations

import importlib.util
import json
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
        for command, _ in gpu.commands(step, True, tmp_path / "bench.json"):
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
    def commands(step: str, quick: bool, bench_json: Path) -> list[tuple[list[str], dict[str, str]]]:
        write = f"open({str(bench_json)!r}, 'w').write('[1]')"
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
