"""L3: how ranks agree: the minimum over the group, with a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["LocalGroup", "TorchGroup"]


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

    rank: int
    size: int

    def __init__(self, process_group: Any = None, timeout_s: float = 30.0, device: Any = "cpu") -> None:
        raise NotImplementedError

    def min(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over the ranks.

        Raises: GroupError if a rank is gone or does not come within timeout_s. The group is of no use then, and every
        further call raises at once.
        """
        raise NotImplementedError
