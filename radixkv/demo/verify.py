"""L6: the checks of the demo, and the faults that prove that the checks can fail.

The reference is a recomputation: the same model, the same chunks, a pool of its own, nothing cached. A served request
is right if the logits of every token that it computed are the same bits, and the KV of every whole page that it read or
wrote is the same bytes. Equal answers would say little: a random model repeats itself, and attention forgives.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..engines.transformers import PagedRunner, page_fingerprints
from ..pool.host import HostKVCache
from ..types import PageIds
from .server import Served

__all__ = ["Reference", "Verdict", "exchange_host_pages", "flip_host_page", "host_page_sample"]
__all__ += ["host_pages_of"]


@dataclass(slots=True)
class Verdict:
    """How one served request compares with its recomputation.

    logits: of ``rows`` tokens, of which ``wrong_rows`` differ, by ``max_difference`` at most.
    pages: compared, of which ``wrong_pages`` (their places in the sequence) hold other bytes. same_answer: whether
    greedy decoding would have said the same. first_token_s: of the recomputation.
    """

    rows: int
    wrong_rows: int
    max_difference: float
    pages: int
    wrong_pages: list[int] = field(default_factory=list)
    same_answer: bool = True
    first_token_s: float = 0.0

    @property
    def right(self) -> bool:
        return not self.wrong_rows and not self.wrong_pages

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"right": self.right}


class Reference:
    """Recomputes requests from nothing."""

    def __init__(self, runner: PagedRunner, text_tokens: int) -> None:
        self._runner, self._text_tokens = runner, text_tokens
        self._pool: Any = None

    def judge(self, served: Served) -> Verdict:
        """Compare one request. Recomputes all of it, the prompt first and timed."""
        runner, size = self._runner, self._runner.page_size
        num_pages = -(-len(served.tokens) // size)
        if self._pool is None or self._pool.size < num_pages * size:
            self._pool = runner.new_pool(2 * num_pages * size)
        slots = torch.arange(size, (num_pages + 1) * size, device=runner.device)
        begin = time.perf_counter()
        rows = [runner.prefill(self._pool, slots, served.tokens[: served.prompt_tokens], 0)]
        rows[0][-1, : self._text_tokens].argmax().item()
        first_token_s = time.perf_counter() - begin
        if len(served.tokens) > served.prompt_tokens:
            rows.append(runner.prefill(self._pool, slots, served.tokens, served.prompt_tokens))
        expected = torch.cat(rows)[-len(served.logits) :]
        whole = len(served.tokens) // size
        pages = page_fingerprints(self._pool, slots[: whole * size])
        return Verdict(
            rows=len(expected),
            wrong_rows=int((~torch.eq(expected, served.logits)).any(dim=1).sum()),
            max_difference=_distance(expected, served.logits),
            pages=whole,
            wrong_pages=[i for i, (a, b) in enumerate(zip(pages, served.fingerprints, strict=True)) if a != b],
            same_answer=bool((self._greedy(expected) == self._greedy(served.logits)).all()),
            first_token_s=first_token_s,
        )

    def _greedy(self, rows: Any) -> Any:
        return rows[:, : self._text_tokens].argmax(dim=1)


def _distance(expected: Any, found: Any) -> float:
    """The largest difference; where one is NaN, the largest finite float (JSON has no infinity)."""
    most = torch.finfo(expected.dtype).max
    return float(torch.nan_to_num((expected - found).abs(), nan=most, posinf=most).max())


# ---- faults ----------------------------------------------------------------------------------------------------------
def flip_host_page(host: HostKVCache, page: int, bit: int = 1 << 4, every: int = 64) -> int:
    """Flip one bit of every ``every``-th byte of a host page, low bits of mantissas. Returns: bytes changed."""
    changed = 0
    for view in _pieces(host, page):
        view[::every] ^= np.uint8(bit)
        changed += len(view[::every])
    return changed


def exchange_host_pages(host: HostKVCache, one: int, other: int) -> None:
    """Let two host pages change places: each is whole, and belongs to the prefix, but not there."""
    for a, b in zip(_pieces(host, one), _pieces(host, other), strict=True):
        a[:], b[:] = b.copy(), a.copy()


def host_page_sample(host: HostKVCache, page: int, num_bytes: int = 256) -> bytes:
    """Some bytes from the middle of a host page, by which it can be found in a file."""
    piece = _pieces(host, page)[0]
    return piece[len(piece) // 2 :][:num_bytes].tobytes()


def _pieces(host: HostKVCache, page: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Writable views of a host page's contiguous pieces."""
    pieces = host.page_buffer(page * host.page_size)
    return [np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) for address, size in pieces]


def host_pages_of(tree: Any, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> tuple[int, PageIds]:
    """Of a sequence: tokens on the device, and the host pages of what follows them on the host."""
    found = tree.peek(tokens)
    return found.num_tokens, found.host_page_ids()
