"""radixkv's HiRadixCache beside the original: same scripts, same answers, sizes, locks, trees and bytes.

The original is SGLang's, ``sglang==0.5.0rc0``, unmodified; ``original/__init__.py`` lists every shim that lets it run
on a CPU. Where the two differ on purpose, a ``Rule`` of ``rules.py`` says why and names a test that shows it. More
seeds: ``python -m tests.hicache.compare``.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from . import side_by_side
from .compare import POLICIES, compare, original, setup_of
from .gate import original_or_skip
from .rules import RULES
from .sides import Setup, make_original, make_ours

pytestmark = [pytest.mark.usefixtures("wheel"), pytest.mark.filterwarnings("ignore:The given buffer is not writable")]

STEPS = 90


@pytest.fixture(scope="module", name="wheel")
def _wheel() -> None:
    original_or_skip()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", POLICIES)
def test_both_do_the_same(policy: str, seed: int) -> None:
    """Device and host. Each seed has its own kind of KV, layout and io backend; page sizes go round."""
    for page_size in (1, 16, 64)[seed % 3 :: 2]:
        report = compare(page_size, policy, seed, False, STEPS)
        assert report.steps > 40, f"ended early by {report.ended_by}"


@pytest.mark.parametrize("seed", [0, 1, 10])
@pytest.mark.parametrize("policy", POLICIES)
def test_both_do_the_same_with_storage(policy: str, seed: int) -> None:
    """Three tiers; the original's are files."""
    for page_size in (16, 1)[: 1 + seed % 2]:
        report = compare(page_size, policy, seed, True, STEPS)
        assert report.steps > 20, f"ended early by {report.ended_by}"


def test_scripts_do_what_they_are_for() -> None:
    """Scripts that evict nothing, load nothing and fetch nothing would agree on anything."""
    done: Counter[str] = Counter()
    for seed, storage in ((0, False), (1, True)):
        report = side_by_side.run(
            setup_of(16, "write_through", seed, storage), seed, 2 * STEPS, make_original, make_original
        )
        done.update(loaded=report.loaded, evicted=report.evicted, fetched=report.fetched)
    assert done["loaded"] > 200
    assert done["evicted"] > 1_000
    assert done["fetched"] > 50


@pytest.mark.parametrize("storage", [False, True], ids=["memory", "storage"])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_originals_with_other_thread_timing_agree(policy: str, storage: bool) -> None:
    """The harness is deterministic: what it reports is the cache's doing, not its threads'."""
    report = side_by_side.run(
        setup_of(16, policy, 1, storage), 1, STEPS, partial(make_original, jitter=1), partial(make_original, jitter=2)
    )
    assert report.ended_by is None
    assert report.steps == STEPS


def damaged_write(side: Any) -> None:
    """One KV row of every write of 48 tokens is wrong."""
    write = side.write
    side.write = lambda slots, rows: write(slots, rows + (len(rows) == 48))


def damaged_lock(side: Any) -> None:
    """Every seventh unlock is forgotten."""
    unlock, calls = side.cache.dec_lock_ref, []
    side.cache.dec_lock_ref = lambda node: unlock(node) if calls.append(1) or len(calls) % 7 else 0


def damaged_eviction(side: Any) -> None:
    """Evicts a token less than asked for."""
    evict = side.cache.evict
    side.cache.evict = lambda tokens: evict(max(0, tokens - 1))


@pytest.mark.parametrize("damage", [damaged_write, damaged_lock, damaged_eviction])
@pytest.mark.parametrize("make", [make_original, make_ours])
def test_a_fault_is_found(damage: Any, make: Any) -> None:
    """Whichever side has it, and whatever the rules allow."""

    def broken(setup: Setup) -> Any:
        side = make(setup)
        damage(side)
        return side

    def compare_all() -> None:
        for seed in range(4):
            side_by_side.run(setup_of(1, "write_through", seed, False), seed, STEPS, original, broken, RULES)

    with pytest.raises(AssertionError):
        compare_all()


def test_nothing_of_the_original_is_imported() -> None:
    with make_original(setup_of(16, "write_back", 0, True)):
        assert not [name for name in sys.modules if name.split(".")[0] in ("sglang", "sgl_kernel", "triton")]


def test_every_rule_is_shown_by_a_test() -> None:
    folder = Path(__file__).parent
    for rule in RULES:
        file, _, name = rule.shown_by.partition("::")
        functions = {node.name for node in ast.parse((folder / file).read_text()).body if hasattr(node, "name")}
        assert name in functions, f"{rule.name}: there is no {rule.shown_by}"
    assert len({rule.name for rule in RULES}) == len(RULES)
