"""libFuzzer on the C ABI, from the committed corpus: a bounded number of runs, a fixed seed (more with `make fuzz`)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .toolchain import HERE, compile_flavour, run

CORPUS = HERE / "corpus"
RUNS = int(os.environ.get("RADIXKV_FUZZ_RUNS", "10000"))


def test_libfuzzer_finds_nothing(tmp_path: Path) -> None:
    program = compile_flavour("fuzz", HERE / "fuzz_tree.c", tmp_path / "fuzz_tree")
    found = tmp_path / "found"
    found.mkdir()
    seeds = list(CORPUS.iterdir())
    assert seeds, "the seed corpus is committed"
    options = [
        f"-runs={RUNS}",
        "-seed=1",
        "-max_len=1024",
        "-len_control=0",
        f"-artifact_prefix={tmp_path}/",
        "-print_final_stats=1",
    ]
    done = run([program, *options, found, CORPUS], env={"ASAN_OPTIONS": "detect_leaks=0"})
    executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) >= RUNS


def test_the_corpus_reaches_what_it_should(tmp_path: Path) -> None:
    """Replaying only the seeds covers most of the operations' code: a corpus gone stale would not."""
    program = compile_flavour("fuzz", HERE / "fuzz_tree.c", tmp_path / "fuzz_tree")
    done = run([program, "-runs=0", CORPUS], env={"ASAN_OPTIONS": "detect_leaks=0"})
    covered = re.search(r"INITED cov: (\d+)", done.stderr)
    assert covered is not None
    assert int(covered[1]) > 1000
