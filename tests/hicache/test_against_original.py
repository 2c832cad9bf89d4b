"""radixkv's HiRadixCache beside the original: same scripts, same answers, sizes, locks, trees and bytes.

The original is SGLang's, ``sglang==0.5.0rc0``, unmodified; ``original/__init__.py`` lists every shim that lets it run
on a CPU. Where the two differ on purpose, a ``Rule`` of ``rules.py`` says why and names a test that shows it.
"""

from __future__ import annotations

import sys
from functools import partial

import pytest

from . import side_by_side
from .gate import original_or_skip
from .sides import Setup, make_original

pytestmark = pytest.mark.usefixtures("original")

DEVICE_TOKENS = {1: 320, 16: 512, 64: 2048}
POLICIES = ("write_through", "write_through_selective", "write_back")


@pytest.fixture(scope="module", name="original")
def _original() -> None:
    original_or_skip()


def setup_of(page_size: int, policy: str, **more: object) -> Setup:
    return Setup(page_size=page_size, write_policy=policy, device_tokens=DEVICE_TOKENS[page_size],
                 prefetch_threshold=2 * page_size, **more)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("storage", [False, True], ids=["memory", "storage"])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_originals_with_other_thread_timing_agree(policy: str, storage: bool) -> None:
    """The harness is deterministic: what it reports is the cache's doing, not its threads'."""
    setup = setup_of(16, policy, storage=storage, host_ratio=1.5)
    for seed in (1, 2):
        report = side_by_side.run(setup, seed, 120, partial(make_original, jitter=1), partial(make_original, jitter=2))
        assert report.ended_by is None
        assert report.steps == 120


def test_a_difference_is_found() -> None:
    """A cache that loses one token of its sizes, or writes one wrong byte, fails the comparison."""
    setup = setup_of(16, "write_through")

    def broken(setup: Setup) -> object:
        side = make_original(setup)
        side.write, write = lambda slots, rows: write(slots, rows + (len(rows) == 48)), side.write  # type: ignore[method-assign]
        return side

    with pytest.raises(side_by_side.Mismatch, match="wrong_kv"):
        side_by_side.run(setup, 3, 120, make_original, broken)  # type: ignore[arg-type]


def test_nothing_of_the_original_is_imported() -> None:
    with make_original(setup_of(16, "write_back", storage=True)):
        assert not [name for name in sys.modules if name.split(".")[0] in ("sglang", "sgl_kernel", "triton")]
