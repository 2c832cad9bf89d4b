"""L3: how ranks agree: the minimum over the group, with a deadline."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

from ..errors import GroupError, InvalidArgumentError

__all__ = ["LocalGroup", "TorchGroup", "compare_ranks"]

PAD = 64
"""Vectors are padded to multiples of this: ranks that disagree a little find out, where a collective would hang."""


WORDS, WORD_BYTES = 1024, 7
"""What ranks that differ tell each other: so much text each, as so many integers below any that stands for nothing."""
NOTHING = (1 << 63) - 1

Agree: TypeAlias = Callable[[Sequence[int]], list[int]]
"""The element-wise minimum over the ranks."""


def compare_ranks(agree: Agree, rank: int, size: int, mine: Mapping[str, object]) -> None:
    """One collective, and one more (agreed on by then) if ranks differ, so that all can say in what.

    Raises: InvalidArgumentError: "ranks differ in max_writes: 4.0 (rank 0, 2), 8.0 (rank 1)"; GroupError.
    """
    if size == 1:
        return
    text = "\n".join(f"{name}\t{value!r}" for name, value in sorted(mine.items()))
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
    low, high = agree([number, -number])
    if low == -high:
        return
    told = _tell(agree, rank, size, text)
    theirs = [dict(line.partition("\t")[::2] for line in other.splitlines()) for other in told]
    differences = []
    for name in sorted(set().union(*theirs)):
        ranks: dict[str, list[str]] = {}
        for number, fields in enumerate(theirs):
            ranks.setdefault(fields.get(name, "nothing"), []).append(str(number))
        if len(ranks) > 1:
            values = ", ".join(f"{value} (rank {', '.join(numbers)})" for value, numbers in ranks.items())
            differences.append(f"{name}: {values}")
    raise InvalidArgumentError(f"ranks differ in {'; '.join(differences)}")


def _tell(agree: Agree, rank: int, size: int, text: str) -> list[str]:
    """The texts of all ranks, by a minimum: each fills its own part of the vector."""
    data = text.encode()[: WORDS * WORD_BYTES].ljust(WORDS * WORD_BYTES, b"\0")
    values = [NOTHING] * (WORDS * size)
    values[WORDS * rank : WORDS * (rank + 1)] = [
        int.from_bytes(data[at : at + WORD_BYTES], "big") for at in range(0, len(data), WORD_BYTES)
    ]
    told = agree(values)
    parts = [told[WORDS * at : WORDS * (at + 1)] for at in range(size)]
    return [b"".join(word.to_bytes(WORD_BYTES, "big") for word in part).rstrip(b"\0").decode(errors="ignore")
            for part in parts]  # fmt: skip


class LocalGroup:
    """One rank, which agrees with itself."""

    rank = 0
    size = 1

    def min(self, values: Sequence[int]) -> list[int]:
        """The values."""
        return list(values)


class TorchGroup:
    """The ranks of a torch.distributed process group.

    Args:
        process_group: gloo (CPU tensors), or nccl (then ``device`` is needed); None: the default group.
        timeout_s: how long a collective may take, on each rank.
        device: where the tensors of the collectives are; "cpu".
    Raises: GroupError without torch.distributed.
    """

    def __init__(self, process_group: Any = None, timeout_s: float = 30.0, device: Any = "cpu") -> None:
        try:
            self._torch: Any = importlib.import_module("torch")
            self._dist: Any = importlib.import_module("torch.distributed")
        except ImportError as error:
            raise GroupError(f"a group of ranks needs torch (radixkv[torch]): {error}") from error
        if not self._dist.is_available() or not self._dist.is_initialized():
            raise GroupError("torch.distributed is not initialised")
        self._group, self._device, self.timeout_s = process_group, device, timeout_s
        self.rank: int = self._dist.get_rank(process_group)
        self.size: int = self._dist.get_world_size(process_group)
        self._broken: GroupError | None = None

    def min(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over the ranks.

        Raises: GroupError if a rank is gone or does not come within timeout_s, or ranks give different numbers of
        values. The group is of no use then, and every further call raises at once.
        """
        if self._broken is not None:
            raise self._broken
        try:
            return self._min(list(values))
        except GroupError as error:
            self._broken = error
            raise

    def _min(self, values: list[int]) -> list[int]:
        count = len(values)
        padding = [0] * (-(count + 2) % PAD)
        tensor = self._torch.tensor([count, -count, *values, *padding], dtype=self._torch.int64, device=self._device)
        try:
            work = self._dist.all_reduce(tensor, op=self._dist.ReduceOp.MIN, group=self._group, async_op=True)
            in_time = work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:  # what torch raises for a dead peer and for a deadline alike
            raise GroupError(f"rank {self.rank} of {self.size}: {error}") from error
        if not in_time:
            raise GroupError(f"rank {self.rank} of {self.size}: no agreement within {self.timeout_s} s")
        low, high, *agreed = tensor.tolist()
        if low != -high:
            raise GroupError(f"rank {self.rank} agrees on {count} values, others on {low} .. {-high}")
        return [int(value) for value in agreed[:count]]
