"""The C programs of this folder against the plugin as it ships. What each checks is said at its head."""

from __future__ import annotations

import re
from pathlib import Path

from .toolchain import HERE, INCLUDE, STRICT, compile_linked, library, run, tool


def test_every_misuse_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    said = run([compile_linked(HERE / "bad_input.c", tmp_path / "bad_input")]).stdout
    refused = re.fullmatch(r"(\d+) misuses refused\n", said)
    assert refused is not None
    assert int(refused[1]) > 300


def test_nothing_is_written_behind_the_structs_of_an_older_host(tmp_path: Path) -> None:
    said = run([compile_linked(HERE / "short_structs.c", tmp_path / "short_structs")]).stdout
    assert said == "nothing is written behind short structs\n"


def test_every_misuse_of_the_index_is_refused(tmp_path: Path) -> None:
    said = run([compile_linked(HERE / "bad_index.c", tmp_path / "bad_index")]).stdout
    refused = re.fullmatch(r"(\d+) misuses of the index refused\n", said)
    assert refused is not None
    assert int(refused[1]) > 40


def test_refused_locks_are_noticed_and_inserts_that_change_nothing_exclude_nobody(tmp_path: Path) -> None:
    said = run([compile_linked(HERE / "index_locks.c", tmp_path / "index_locks")]).stdout
    assert re.fullmatch(r"\d+ locks refused, none left behind\n", said)


def test_every_failing_allocation_changes_nothing_and_leaks_nothing(tmp_path: Path) -> None:
    said = run([compile_linked(HERE / "alloc_failure.c", tmp_path / "alloc_failure")]).stdout
    failures = re.match(r"(\d+) allocation failures in (\d+) kinds of operation", said)
    assert failures is not None
    assert int(failures[1]) >= 300
    assert int(failures[2]) >= 10


def test_random_operations_keep_the_books(tmp_path: Path) -> None:
    program = tmp_path / "random"
    sources = [HERE / "fuzz_tree.c", HERE / "random_driver.c"]
    flags = ["-std=c11", *STRICT, "-O1", "-g", f"-I{INCLUDE}"]
    run([tool("gcc"), *flags, *sources, library(), f"-Wl,-rpath,{library().parent}", "-o", program])
    assert run([program, "1", "3000", "2000"]).stdout == "3000 runs from seed 1\n"


def test_threads_lose_no_page(tmp_path: Path) -> None:
    program = compile_linked(HERE / "thread_stress.c", tmp_path / "thread_stress")
    assert run([program, "4", "20000", "1"]).stdout == "4 threads, 20000 operations each: no page lost\n"


def test_threads_find_what_their_workers_hold(tmp_path: Path) -> None:
    program = compile_linked(HERE / "index_stress.c", tmp_path / "index_stress")
    for seed, max_pages in [("1", "0"), ("2", "0"), ("3", "0"), ("4", "200")]:
        assert (
            run([program, "4", "15000", seed, max_pages]).stdout
            == "4 threads, 15000 operations each: every find was right\n"
        )
