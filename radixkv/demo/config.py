"""L6: the settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import InvalidArgumentError

__all__ = ["DemoConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What the demo serves, and in how little memory.

    Args:
        model: a name in engines.models.MODELS.
        device: of the model and the device tier: "cpu", or "cuda[:N]", where copies go over the GPU path and the host
            tier is page-locked.
        users, turns_before, turns_after: conversations, and their turns before and after the restart.
        answer_tokens: of each answer, at most.
        page_size, chunk_tokens: tokens; a chunk is whole pages.
        device_tokens, host_tokens: capacities of the two tiers; 0: one long conversation and a bit, and 1.8 times that,
            so that KV has to move.
        seed: of what the users say.
        threads: of the model; 0: as torch chooses. One: with so small a model more only wait for each other, for long
            if the machine has something else to do.
    """

    model: str = "random"
    device: str = "cpu"
    users: int = 4
    turns_before: int = 2
    turns_after: int = 2
    answer_tokens: int = 12
    page_size: int = 16
    chunk_tokens: int = 32
    device_tokens: int = 0
    host_tokens: int = 0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("users", "turns_before", "turns_after", "answer_tokens", "page_size", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, and must be at least 1")
        for name in ("device_tokens", "host_tokens"):
            tokens, size = getattr(self, name), self.page_size
            if tokens < 0 or tokens % size:
                near = f"{tokens // size * size} or {-(-tokens // size) * size}"
                raise InvalidArgumentError(f"{name} is {tokens}: not whole pages of {size}, as {near} would be")

    def sized(self, longest_tokens: int) -> DemoConfig:
        """With capacities, where none was asked for, for conversations of at most ``longest_tokens``.

        Raises: InvalidArgumentError if one does not fit on the device. It need not fit on the host: then less is shown.
        """
        size = self.page_size
        least = (longest_tokens // size + 2) * size
        device = self.device_tokens or least
        if device < least:
            raise InvalidArgumentError(
                f"device_tokens is {device}: a conversation may have {longest_tokens} tokens, which needs {least}"
            )
        return replace(self, device_tokens=device, host_tokens=self.host_tokens or int(1.8 * device) // size * size)
