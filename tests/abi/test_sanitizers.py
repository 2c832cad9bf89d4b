"""The C programs under ASan + UBSan, TSan and valgrind. A finding ends the program with a status that is not 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from .toolchain import HERE, INCLUDE, STRICT, compile_flavour, compile_linked, library, run, tool

SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:history_size=4",
}


def _run_sanitized(program: Path, *arguments: str) -> str:
    # without address space randomisation, because older TSan runtimes do not know where newer kernels map
    done = run([tool("setarch"), "-R", program, *arguments], env=SANITIZER_OPTIONS)
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("bad_input.c", []),
        ("bad_index.c", []),
        ("alloc_failure.c", ["3"]),
        ("thread_stress.c", ["4", "3000", "2"]),
        ("index_stress.c", ["4", "3000", "2", "0"]),
    ],
)
def test_address_and_undefined_behaviour(tmp_path: Path, source: str, arguments: list[str]) -> None:
    program = compile_flavour("asan", HERE / source, tmp_path / "program")
    assert _run_sanitized(program, *arguments)


def test_address_and_undefined_behaviour_at_random(tmp_path: Path) -> None:
    program = compile_flavour("asan", HERE / "fuzz_tree.c", tmp_path / "program", str(HERE / "random_driver.c"))
    assert _run_sanitized(program, "100000", "1500", "2000") == "1500 runs from seed 100000\n"


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        ("thread_stress.c", ["4", "4000", "1"], "no page lost"),
        ("thread_stress.c", ["3", "4000", "2"], "no page lost"),
        ("index_stress.c", ["4", "4000", "1", "0"], "every find was right"),
        ("index_stress.c", ["3", "4000", "2", "0"], "every find was right"),
        ("index_stress.c", ["4", "4000", "3", "200"], "every find was right"),
    ],
)
def test_data_races(tmp_path: Path, source: str, arguments: list[str], said: str) -> None:
    program = compile_flavour("tsan", HERE / source, tmp_path / "program")
    assert said in _run_sanitized(program, *arguments)


def test_the_thread_sanitizer_would_find_a_race(tmp_path: Path) -> None:
    """The same flags find a race in a program that has one: silence above is an answer."""
    source = tmp_path / "race.c"
    source.write_text(
        "#include <pthread.h>\n#include <radixkv/radixkv.h>\nstatic int shared;\n"
        "static void *add(void *p) { (void)p; for (int i = 0; i < 10000; i++) shared++; return NULL; }\n"
        "int main(void) { pthread_t a, b; pthread_create(&a, NULL, add, NULL); pthread_create(&b, NULL, add, NULL);\n"
        "pthread_join(a, NULL); pthread_join(b, NULL); return rkv_version()[0] == 0; }\n"
    )
    program = compile_flavour("tsan", source, tmp_path / "program")
    with pytest.raises(pytest.fail.Exception, match="ThreadSanitizer: data race"):
        _run_sanitized(program)


def test_the_address_sanitizer_sees_into_the_core(tmp_path: Path) -> None:
    """A read past the end of a caller's buffer happens inside the library: it is compiled with the checks as well."""
    source = tmp_path / "overread.c"
    source.write_text(
        "#include <radixkv/radixkv.h>\n#include <stdlib.h>\n"
        "int main(void) { rkv_tree *t; rkv_key k; rkv_insert o; int32_t id = 0, d;\n"
        "int32_t *p = malloc(15 * sizeof *p);\n"
        "for (int i = 0; i < 15; i++) p[i] = i;\n"
        "RKV_INIT(&k); RKV_INIT(&o); k.tokens = p; k.num_tokens = 16;\n"
        "return rkv_tree_create(NULL, &t) || rkv_tree_insert(t, &k, &id, 1, NULL, 0, &d, &o); }\n"
    )
    program = compile_flavour("asan", source, tmp_path / "program")
    with pytest.raises(pytest.fail.Exception, match="AddressSanitizer: heap-buffer-overflow"):
        _run_sanitized(program)


def _valgrind(program: Path, *arguments: str) -> str:
    options = ["--error-exitcode=99", "--leak-check=full", "--show-leak-kinds=all", "--errors-for-leak-kinds=all", "-q"]
    return run([tool("valgrind"), *options, program, *arguments]).stdout


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("bad_input.c", []),
        ("bad_index.c", []),
        ("alloc_failure.c", ["1"]),
        ("thread_stress.c", ["3", "500", "3"]),
        ("index_stress.c", ["3", "500", "3", "200"]),
    ],
)
def test_valgrind(tmp_path: Path, source: str, arguments: list[str]) -> None:
    assert _valgrind(compile_linked(HERE / source, tmp_path / "program"), *arguments)


def test_valgrind_at_random(tmp_path: Path) -> None:
    program = tmp_path / "random"
    flags = ["-std=c11", *STRICT, "-O1", "-g", f"-I{INCLUDE}", f"-Wl,-rpath,{library().parent}"]
    run([tool("gcc"), *flags, HERE / "fuzz_tree.c", HERE / "random_driver.c", library(), "-o", program])
    assert _valgrind(program, "200000", "60", "1500") == "60 runs from seed 200000\n"
