"""L6: the settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidArgumentError

__all__ = ["DemoConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What the demo serves, and in how little memory.

    Args:
        model: a name in engines.models.MODELS.
        users, turns_before, turns_after: conversations, and their turns before and after the restart.
        answer_tokens: of each answer, at most.
        page_size, chunk_tokens: tokens; a chunk is whole pages.
        device_tokens, host_tokens: capacities of the two tiers. The defaults hold one long conversation and a bit, and
            two of them: so that KV has to move.
        seed: of what the users say.
        threads: of the model; 0: as torch chooses.
    """

    model: str = "random"
    users: int = 4
    turns_before: int = 2
    turns_after: int = 2
    answer_tokens: int = 12
    page_size: int = 16
    chunk_tokens: int = 32
    device_tokens: int = 2048
    host_tokens: int = 2816
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("users", "turns_before", "turns_after", "answer_tokens", "page_size", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, and must be at least 1")
        for name in ("device_tokens", "host_tokens"):
            if getattr(self, name) < self.page_size or getattr(self, name) % self.page_size:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: not whole pages of {self.page_size}")
