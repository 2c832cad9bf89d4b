"""The kernels between pools as engines hand them over, and what is refused before any launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from radixkv.errors import ArgumentTypeError, InvalidArgumentError, PageOwnershipError
from radixkv.pool.layout import KVGeometry, KVView, view_of_layout
from radixkv.transfer.launch import Family
from radixkv.transfer.plan import plan_copy

from . import backends
from .backends import POISON, Backend, Block

L, PAGES, P, H, D = 3, 6, 4, 2, 48
G = KVGeometry(kind="mha", num_layers=L, num_heads=H, head_bytes=D, page_size=P)

# How each engine's pool is shaped, as one array of bytes, and the axes that bring it to [halves, L, pages, P, H, D].
ENGINES: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    # SGLang: k_buffer[l] and v_buffer[l], [slots, H, D] each
    "sglang": ((2, L, PAGES * P, H, D), lambda a: a.reshape(2, L, PAGES, P, H, D)),
    # vLLM on a GPU, NHD: one tensor a layer, [2, pages, P, H, D]
    "vllm_nhd": ((L, 2, PAGES, P, H, D), lambda a: a.transpose(1, 0, 2, 3, 4, 5)),
    # vLLM on a GPU, HND: [2, pages, H, P, D]
    "vllm_hnd": ((L, 2, PAGES, H, P, D), lambda a: a.transpose(1, 0, 2, 4, 3, 5)),
    # vLLM on a GPU, K and V within a page: [pages, 2, P, H, D]
    "vllm_paged": ((L, PAGES, 2, P, H, D), lambda a: a.transpose(2, 0, 1, 3, 4, 5)),
    # vLLM on a CPU: [pages, H, P, 2 * D], K before V in each row
    "vllm_cpu": ((L, PAGES, H, P, 2, D), lambda a: a.transpose(4, 0, 1, 3, 2, 5)),
    # storage: one object a page, [pages, halves, L, P, H, D]
    "storage": ((PAGES, 2, L, P, H, D), lambda a: a.transpose(1, 2, 0, 3, 4, 5)),
}


@pytest.fixture(params=["hostsim", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backends.backend(request.param)


def view_of(engine: str, block: Block) -> KVView:
    """The view of an engine's pool that lies in one block of memory."""
    shape, axes = ENGINES[engine]
    layout = axes(np.empty(shape, dtype=np.uint8))
    half, layer, page, token, head, _ = layout.strides
    offsets = np.arange(2)[:, None] * half + np.arange(L) * layer
    return KVView(
        bases=(offsets + block.addresses[0]).astype(np.uint64),
        page_stride=page,
        token_stride=token,
        head_stride=head,
        num_slots=PAGES * P,
        device=block.device,
    )


@pytest.mark.parametrize("family", ["copy", "relayout", "bulk"])
@pytest.mark.parametrize("dst", ENGINES)
@pytest.mark.parametrize("src", ENGINES)
def test_between_the_pools_of_engines(backend: Backend, src: str, dst: str, family: Family) -> None:
    size = int(np.prod(ENGINES[src][0]))
    content = np.random.default_rng(9).integers(0, 256, (1, size), dtype=np.uint8)
    poison = np.full((1, size), POISON, dtype=np.uint8)
    blocks = backend.place(content, "device"), backend.place(poison, "host")
    src_pages, dst_pages = [5, 0, 3], [1, 4, 2]
    plan = plan_copy(G, view_of(src, blocks[0]), view_of(dst, blocks[1]), src_pages, dst_pages)
    backend.run(plan, family=family)

    def whole(engine: str, memory: npt.NDArray[np.uint8]) -> Any:
        shape, axes = ENGINES[engine]
        return axes(memory.reshape(shape))

    expected = poison.copy()
    whole(dst, expected)[:, :, dst_pages] = whole(src, content)[:, :, src_pages]
    assert (blocks[1].read() == expected).all()
    assert (blocks[0].read() == content).all()


SRC = view_of_layout("layer_first", G, PAGES * P, [1 << 40, 2 << 40], "cuda:0")
DST = view_of_layout("page_first", G, PAGES * P, [3 << 40, 4 << 40])

REFUSED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "a page beyond the pool": ({"src_pages": [0, PAGES]}, InvalidArgumentError),
    "a negative page": ({"dst_pages": [0, -1]}, InvalidArgumentError),
    "page lists of two lengths": ({"src_pages": [0, 1, 2]}, InvalidArgumentError),
    "a destination page twice": ({"dst_pages": [3, 3]}, PageOwnershipError),
    "page ids of another dtype": ({"src_pages": np.array([0.0, 1.0])}, ArgumentTypeError),
    "page ids of another width": ({"src_pages": np.array([0, 1], dtype=np.int16)}, ArgumentTypeError),
    "a table of page ids": ({"src_pages": np.zeros((2, 1), dtype=np.int64)}, ArgumentTypeError),
    "layers beyond the last": ({"layers": range(1, L + 1)}, InvalidArgumentError),
    "a page that is read and written": ({"dst": SRC, "dst_pages": [1, 2]}, InvalidArgumentError),
    "two views of one memory": (
        {"dst": replace(SRC, bases=SRC.bases + np.uint64(D)), "dst_pages": [0, 1]}, InvalidArgumentError),
    "bases of another dtype": ({"src": replace(SRC, bases=SRC.bases.astype(np.int64))}, ArgumentTypeError),
    "bases of another shape": ({"src": replace(SRC, bases=SRC.bases[:1])}, InvalidArgumentError),
    "strides that fold": ({"dst": replace(DST, token_stride=D)}, InvalidArgumentError),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_before_any_launch(what: str) -> None:
    change, error = REFUSED[what]
    arguments: dict[str, Any] = {"src": SRC, "dst": DST, "src_pages": [0, 1], "dst_pages": [4, 5]}
    plan_copy(G, **arguments)
    with pytest.raises(error):
        plan_copy(G, **(arguments | change))
