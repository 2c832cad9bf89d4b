"""pool/device.py, pool/foreign.py, pool/arrays.py: a byte lies where the view says, for every engine layout; others
are refused."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from radixkv.errors import (
    ArgumentTypeError,
    DeviceUnavailableError,
    InvalidArgumentError,
    RadixKVError,
    UnsupportedLayoutError,
)
from radixkv.pool import arrays
from radixkv.pool.device import DevicePool, MHATokenToKVPool, MLATokenToKVPool
from radixkv.pool.foreign import EnginePool, view_of_engine_pool, view_of_tensors
from radixkv.pool.layout import KVGeometry, KVView

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
L, N, P, H, D = 3, 5, 4, 2, 6  # all different where it matters, P odd-sized against H
S = N * P


def address(view: KVView, geometry: KVGeometry, half: int, layer: int, slot: int, head: int) -> int:
    """The formula of layout.py, written out."""
    page, offset = divmod(slot, geometry.page_size)
    base = int(view.bases[half, layer])
    return base + page * view.page_stride + offset * view.token_stride + head * view.head_stride


def row_at(where: int, num_bytes: int) -> bytes:
    return ctypes.string_at(where, num_bytes)


def filled(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """A tensor of random bytes, so that no two heads are alike."""
    item = torch.empty((), dtype=dtype).element_size()
    raw = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * item), np.uint8)
    return torch.from_numpy(raw).view(dtype)


def check(pool: EnginePool, find: Any, kind: str = "mha", heads: int = H) -> None:
    """Every head of the pool: the bytes at the view's address are those of ``find(half, layer, slot, head)``."""
    g = pool.geometry
    assert (g.kind, g.num_layers, g.num_heads) == (kind, L, heads)
    assert pool.view.bases.shape == (g.halves, L)
    assert pool.view.bases.dtype == np.uint64
    count = 0
    for half, layer, slot, head in itertools.product(range(g.halves), range(L), range(S), range(heads)):
        wanted = find(half, layer, slot, head).contiguous().view(torch.uint8).numpy().tobytes()
        assert len(wanted) == g.head_bytes
        assert row_at(address(pool.view, g, half, layer, slot, head), g.head_bytes) == wanted
        count += 1
    assert count == g.halves * L * S * heads


# ---- engines' pools --------------------------------------------------------------------------------------------------
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sglang_mha(dtype: Any) -> None:
    k = [filled((S, H, D), dtype, i) for i in range(L)]
    v = [filled((S, H, D), dtype, 100 + i) for i in range(L)]
    pool = view_of_engine_pool(SimpleNamespace(k_buffer=k, v_buffer=v, page_size=P, head_num=H, layer_num=L))
    assert (pool.geometry.page_size, pool.view.num_slots, pool.view.device, pool.dims) == (P, S, "cpu", "S H D")
    check(pool, lambda half, layer, slot, head: (k, v)[half][layer][slot, head])


def test_sglang_mha_with_one_tensor_for_all_layers() -> None:
    k, v = filled((L, S, H, D), torch.bfloat16, 1), filled((L, S, H, D), torch.bfloat16, 2)
    pool = view_of_engine_pool(SimpleNamespace(k_buffer=k, v_buffer=v, page_size=P, head_num=H, layer_num=L))
    assert pool.dims == "L S H D"
    check(pool, lambda half, layer, slot, head: (k, v)[half][layer, slot, head])


@pytest.mark.parametrize("page_size", [1, P])
def test_sglang_mla(page_size: int) -> None:
    kv = [filled((S, 1, D), torch.bfloat16, i) for i in range(L)]
    pool = view_of_engine_pool(SimpleNamespace(kv_buffer=kv, page_size=page_size))
    assert pool.geometry.page_size == page_size
    check(pool, lambda _half, layer, slot, _head: kv[layer][slot, 0], "mla", 1)


def test_the_stride_of_a_single_head_means_nothing() -> None:
    k = torch.zeros(S, 1, D).as_strided((S, 1, D), (D, 999, 1))
    v = torch.zeros(S, 1, D)
    pool = view_of_tensors([k], [v], page_size=P)
    assert (pool.geometry.num_heads, pool.view.head_stride) == (1, D * 4)


def test_mla_with_no_dimension_of_heads() -> None:
    kv = [filled((S, D), torch.float16, i) for i in range(L)]
    check(view_of_tensors(kv, kind="mla", page_size=P), lambda _h, layer, slot, _: kv[layer][slot], "mla", 1)


def test_vllm_mla() -> None:
    kv = {f"layers.{i}": filled((N, P, D), torch.bfloat16, i) for i in range(L)}
    pool = view_of_tensors(kv, kind="mla", page_size=P)
    assert pool.dims == "N P D"
    tensors = list(kv.values())
    check(pool, lambda _half, layer, slot, _head: tensors[layer][slot // P, slot % P], "mla", 1)


def test_vllm_flash_attention_nhd() -> None:
    kv = [filled((2, N, P, H, D), torch.bfloat16, i) for i in range(L)]
    pool = view_of_tensors(kv, page_size=P, num_heads=H)
    assert pool.dims == "K N P H D"
    assert pool.view.token_stride == H * D * 2
    check(pool, lambda half, layer, slot, head: kv[layer][half, slot // P, slot % P, head])


def test_vllm_flash_attention_hnd_is_a_permuted_tensor() -> None:
    kv = [filled((2, N, H, P, D), torch.bfloat16, i).permute(0, 1, 3, 2, 4) for i in range(L)]
    pool = view_of_tensors(kv, page_size=P, num_heads=H)
    assert pool.dims == "K N P H D"
    assert (pool.view.head_stride, pool.view.token_stride) == (P * D * 2, D * 2)
    check(pool, lambda half, layer, slot, head: kv[layer][half, slot // P, slot % P, head])


@pytest.mark.parametrize("permuted", [False, True])
def test_vllm_flashinfer(permuted: bool) -> None:
    kv = [filled((N, 2, H, P, D) if permuted else (N, 2, P, H, D), torch.float16, i) for i in range(L)]
    kv = [t.permute(0, 1, 3, 2, 4) if permuted else t for t in kv]
    pool = view_of_tensors(kv, page_size=P, num_heads=H)
    assert pool.dims == "N K P H D"
    check(pool, lambda half, layer, slot, head: kv[layer][slot // P, half, slot % P, head])


def test_contiguous_heads_outside_of_slots() -> None:
    kv = [filled((2, N, H, P, D), torch.bfloat16, i) for i in range(L)]
    pool = view_of_tensors(kv, page_size=P, num_heads=H)
    assert pool.dims == "K N H P D"
    check(pool, lambda half, layer, slot, head: kv[layer][half, slot // P, head, slot % P])


@pytest.mark.parametrize("permuted", [False, True])
def test_vllm_with_k_and_v_in_one_row(permuted: bool) -> None:
    kv = [filled((N, P, H, 2 * D) if permuted else (N, H, P, 2 * D), torch.bfloat16, i) for i in range(L)]
    kv = [t.permute(0, 2, 1, 3) if permuted else t for t in kv]
    pool = view_of_tensors(kv, page_size=P, num_heads=H)
    assert pool.dims == "N H P (K D)"
    assert pool.geometry.head_bytes == D * 2
    check(pool, lambda half, layer, slot, head: kv[layer][slot // P, head, slot % P, half * D : (half + 1) * D])


def test_k_heads_and_v_heads_in_one_dimension_are_read_if_told() -> None:
    kv = [filled((N, 2 * H, P, 9), torch.uint8, i) for i in range(L)]
    pool = view_of_tensors(kv, dims="N (K H) P D")
    assert pool.geometry.head_bytes == 9
    check(pool, lambda half, layer, slot, head: kv[layer][slot // P, half * H + head, slot % P])


@pytest.mark.parametrize("heads_outside", [False, True])
def test_k_and_v_apart_by_pages(heads_outside: bool) -> None:
    shape = (N, H, P, D) if heads_outside else (N, P, H, D)
    k = [filled(shape, torch.bfloat16, i) for i in range(L)]
    v = [filled(shape, torch.bfloat16, 100 + i) for i in range(L)]

    def find(half: int, layer: int, slot: int, head: int) -> Any:
        page = (k, v)[half][layer][slot // P]
        return page[head, slot % P] if heads_outside else page[slot % P, head]

    check(view_of_tensors(k, v, page_size=P, num_heads=H), find)


def test_one_tensor_for_all_layers_with_layers_inside_of_pages() -> None:
    kv = filled((N, L, 2, P, H, D), torch.bfloat16, 1)
    pool = view_of_tensors(kv, dims="N L K P H D")
    check(pool, lambda half, layer, slot, head: kv[slot // P, layer, half, slot % P, head])


def test_pages_of_evenly_spaced_slots_may_be_read_in_pages_of_another_size() -> None:
    kv = [filled((2, N, P, H, D), torch.bfloat16, i) for i in range(L)]
    pool = view_of_tensors(kv, page_size=2, num_heads=H, dims="K N P H D")
    assert pool.geometry.page_size == 2
    check(pool, lambda half, layer, slot, head: kv[layer][half, slot // P, slot % P, head])


def test_slots_that_are_no_whole_page_are_left_out() -> None:
    k, v = torch.zeros(11, H, D), torch.zeros(11, H, D)
    assert view_of_tensors([k], [v], page_size=P).view.num_slots == 8


def test_numpy_arrays_and_array_interfaces_of_a_device() -> None:
    k, v = ([np.zeros((S, H, D), np.float32) for _ in range(L)] for _ in range(2))
    assert view_of_tensors(k, v, page_size=P).view.bases[1, 2] == v[2].ctypes.data
    cupy_like = [
        SimpleNamespace(
            __cuda_array_interface__={"shape": (S, H, D), "typestr": "<f2", "data": (4096 * (i + 1), False)},
            device=SimpleNamespace(id=1),
        )
        for i in range(4)
    ]
    pool = view_of_tensors(cupy_like[:2], cupy_like[2:], page_size=P)
    assert pool.view.device == "cuda:1"
    assert pool.view.bases.tolist() == [[4096, 8192], [12288, 16384]]
    assert (pool.view.page_stride, pool.view.token_stride, pool.view.head_stride) == (P * H * D * 2, H * D * 2, D * 2)


# ---- refused ---------------------------------------------------------------------------------------------------------
def refused(match: str, *tensors: Any, error: type[RadixKVError] = UnsupportedLayoutError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        view_of_tensors(*tensors, **options)


def test_refusals_name_the_shapes_and_strides() -> None:
    x_packed = [torch.zeros(N, H, D, P, 8)] * 1  # the old paged attention: key heads cut in pieces of 16 bytes
    refused(r"shape \[5, 2, 6, 4, 8\], strides \[\d+, .*\] bytes.*is none of", x_packed, page_size=P, num_heads=H)
    refused("may be any of: K N P H D, K N H P D", [torch.zeros(2, N, P, P, D)], page_size=P)
    refused("not contiguous", [torch.zeros(2, N, P, H, 2 * D)[..., ::2]], page_size=P, num_heads=H)
    refused("share memory", [torch.zeros(1, N, P, H, D).expand(2, N, P, H, D)], page_size=P, num_heads=H)
    overlapping = as_strided(np.zeros(4096, np.uint8), (2, N, P, H, D), (512, 64, 8, 4, 1))
    refused("share memory", [overlapping], page_size=P, num_heads=H)
    overlapping = as_strided(np.zeros(4096, np.uint8), (2, N, P, H, D), (512, 40, 12, 6, 1))
    refused("share memory", [overlapping], page_size=P, num_heads=H)  # of pages
    refused("is none of", [torch.zeros(N, P, H, D)])  # could be K alone
    refused("layers differ", [torch.zeros(2, N, P, H, D), torch.zeros(2, N, P, H, D + 1)], page_size=P)
    refused("K and V, differ", [torch.zeros(S, H, D)], [torch.zeros(S, H, D + 2)], page_size=P)
    refused("1 and 2 layers", [torch.zeros(S, H, D)], [torch.zeros(S, H, D), torch.zeros(S, H, D)], page_size=P)
    same = torch.zeros(S, H, D)
    refused("begin at one address", [same], [same], page_size=P)
    refused("pages of 4 slots, not of 2", [torch.zeros(N, 2, P, H, D)], page_size=2, dims="N K P H D")
    refused("one latent row", [torch.zeros(S, 2, D)], kind="mla", dims="S H D")
    refused("no tensors", [])


def test_wrong_letters_are_the_callers_mistake() -> None:
    tensor = torch.zeros(2, N, P, H, D)
    for dims in ("K N P H", "K N H D X", "K N N H D", "K P H D S L", "K N S H D", "K L H P D",
                 "N H P (K P)", "N (H K) P D"):
        refused("dims", [tensor], dims=dims, error=RadixKVError)
    refused("3 halves", [torch.zeros(3, N, P, H, D)], dims="K N P H D")
    refused("not K and V of one size", [torch.zeros(N, H, P, 7)], dims="N H P (K D)")
    refused("K and V together", [torch.zeros(N, P, H, D)], dims="N P H D", error=InvalidArgumentError)
    refused("no values apart", [tensor], [tensor], kind="mla", error=InvalidArgumentError)
    refused("all layers", [tensor, tensor], dims="L N P H D", error=InvalidArgumentError)
    refused("neither a torch tensor", ["KV"], error=ArgumentTypeError)


@pytest.mark.parametrize("attribute", ["k_scale_buffer", "index_k_with_scale_buffer", "swa_kv_pool"])
def test_pools_that_keep_kv_elsewhere_are_refused(attribute: str) -> None:
    pool = SimpleNamespace(k_buffer=[torch.zeros(S, H, D)], v_buffer=[torch.zeros(S, H, D)], page_size=P)
    setattr(pool, attribute, [torch.zeros(S)])
    with pytest.raises(UnsupportedLayoutError, match=attribute):
        view_of_engine_pool(pool)


def test_other_objects_are_refused_as_a_value_error() -> None:
    with pytest.raises(ValueError, match="neither k_buffer and v_buffer"):
        view_of_engine_pool(object())


# ---- pools of our own ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8", "fp8_e5m2", "uint8"])
def test_own_mha_pool(library: Any, dtype: str) -> None:
    pool = MHATokenToKVPool(S, P, dtype, H, D, L, library=library)
    item = {"bf16": 2, "fp16": 2, "fp32": 4}.get(dtype, 1)
    assert pool.geometry == KVGeometry(kind="mha", num_layers=L, num_heads=H, head_bytes=D * item, page_size=P)
    assert pool.view().num_slots == S + P  # and the page of padding
    assert pool.get_kv_size_bytes() == (L * (S + P) * H * D * item,) * 2
    addresses, sizes, page_bytes = pool.get_contiguous_buf_infos()
    assert addresses == pool.view().bases.reshape(-1).tolist()
    assert (len(addresses), set(sizes), set(page_bytes)) == (2 * L, {(S + P) * H * D * item}, {P * H * D * item})
    where = address(pool.view(), pool.geometry, 1, L - 1, S + P - 1, H - 1)
    ctypes.memset(where, 0x3C, D * item)
    last = pool.v_buffer[-1][-1, -1]
    assert bytes(memoryview(last.view(torch.uint8).numpy() if library == "torch" else last)) == b"\x3c" * (D * item)
    assert pool.k_data_ptrs.tolist() == addresses[:L]


def test_tokens_written_are_read_back() -> None:
    pool = MHATokenToKVPool(S, P, torch.float8_e4m3fn, H, D, L, start_layer=7, end_layer=7 + L - 1)
    loc = torch.tensor([4, 9, 5])
    k, v = torch.randn(3, H, D), torch.randn(3, H, D)
    pool.set_kv_buffer(SimpleNamespace(layer_id=8), loc, k, v, k_scale=2.0)
    assert torch.equal(pool.get_key_buffer(8)[loc], (k / 2.0).to(torch.float8_e4m3fn))
    assert torch.equal(pool.get_kv_buffer(8)[1][loc], v.to(torch.float8_e4m3fn))
    saved = pool.get_cpu_copy(loc)
    other = torch.tensor([12, 13, 14])
    pool.load_cpu_copy(saved, other)
    assert torch.equal(pool.get_value_buffer(8)[other], v.to(torch.float8_e4m3fn))
    with pytest.raises(InvalidArgumentError, match=r"layer 6 is not of 7 \.\. 9"):
        pool.get_key_buffer(6)


def test_packed_rows_are_bytes_and_nothing_is_converted_to_them() -> None:
    pool = MHATokenToKVPool(S, P, torch.uint8, H, 20, L)
    rows = torch.arange(40, dtype=torch.uint8).reshape(1, H, 20)
    pool.set_kv_buffer(0, torch.tensor([5]), rows, rows)
    assert torch.equal(pool.get_key_buffer(0)[5], rows[0])
    with pytest.raises(ArgumentTypeError, match="packed"):
        pool.set_kv_buffer(0, torch.tensor([5]), rows.float(), rows.float())


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_rows_of_a_wrong_shape_write_nothing(library: Any) -> None:
    pool = MHATokenToKVPool(S, P, "fp32", H, D, L, library=library)
    rows, loc = np.ones((2, H, D), np.float32), np.array([4, 9])
    if library == "torch":
        rows, loc = torch.from_numpy(rows), torch.from_numpy(loc)
    for k, v, name in ((rows, rows[:1], "cache_v"), (rows[..., :-1], rows, "cache_k"), (rows[:, 0], rows, "cache_k")):
        with pytest.raises(InvalidArgumentError, match=rf"{name} is \(.*not \(2, {H}, {D}\)"):
            pool.set_kv_buffer(0, loc, k, v)
    assert not pool.k_buffer[0].any()
    mla = MLATokenToKVPool(S, P, "fp32", 4, 2, L, library=library)
    with pytest.raises(InvalidArgumentError, match=r"cache_k_rope is \(2, 1, 3\), not \(2, 1, 2\)"):
        mla.set_mla_kv_buffer(0, loc, rows[:, :1, :4], rows[:, :1, :3])
    assert not mla.kv_buffer[0].any()


def test_a_page_of_no_slots_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="page_size is 0, and must be at least 1"):
        view_of_tensors([np.zeros((8, 1, 16))], kind="mla", page_size=0)


def test_numpy_pools_take_bytes_of_what_numpy_has_no_name_for() -> None:
    pool = MHATokenToKVPool(S, P, "bf16", H, D, 1, library="numpy")
    rows = np.full((2, H, D), 0x3F80, np.uint16)
    pool.set_kv_buffer(0, np.array([4, 6]), rows, rows)
    assert (pool.get_key_buffer(0)[[4, 6]] == 0x3F80).all()
    with pytest.raises(ArgumentTypeError, match="numpy cannot convert float32 to bfloat16"):
        pool.set_kv_buffer(0, np.array([4]), np.zeros((1, H, D), np.float32), rows[:1])
    half = MHATokenToKVPool(S, P, "fp16", H, D, 1, library="numpy")
    half.set_kv_buffer(0, np.array([4]), np.ones((1, H, D), np.float32), np.ones((1, H, D), np.float32), v_scale=2)
    assert (half.get_value_buffer(0)[4] == 0.5).all()


def test_own_mla_pool() -> None:
    pool = MLATokenToKVPool(S, P, torch.bfloat16, 4, 2, L)
    assert pool.geometry == KVGeometry(kind="mla", num_layers=L, num_heads=1, head_bytes=12, page_size=P)
    nope, rope = torch.randn(2, 1, 4, dtype=torch.bfloat16), torch.randn(2, 1, 2, dtype=torch.bfloat16)
    loc = torch.tensor([3, 8])
    pool.set_mla_kv_buffer(1, loc, nope, rope)
    assert torch.equal(pool.get_key_buffer(1)[loc], torch.cat([nope, rope], -1))
    assert torch.equal(pool.get_value_buffer(1)[loc], nope)
    pool.set_kv_buffer(2, loc, torch.cat([nope, rope], -1))
    assert torch.equal(pool.get_kv_buffer(2)[0][loc], torch.cat([nope, rope], -1))
    assert pool.get_kv_size_bytes() == L * (S + P) * 12
    check_layers = view_of_engine_pool(pool)
    assert check_layers.view.bases.shape == (1, L)


def test_reading_a_layer_waits_for_its_load() -> None:
    waited: list[int] = []
    for pool in (MHATokenToKVPool(S, P, "fp32", H, D, L, start_layer=2), MLATokenToKVPool(S, P, "fp32", 4, 2, L)):
        pool.register_layer_transfer_counter(SimpleNamespace(wait_until=waited.append))
        pool.get_kv_buffer(pool.start_layer + 1)
    assert set(waited) == {1}


@pytest.mark.parametrize(("options", "match"), [
    ({"size": 0}, "0 tokens"), ({"size": 6}, "6 tokens"), ({"dtype": "int4"}, "int4"), ({"head_num": 0}, "num_heads"),
    ({"layer_num": 0}, "num_layers"), ({"device": "tpu"}, "tpu"), ({"enable_memory_saver": True}, "memory_saver"),
    ({"start_layer": 3, "end_layer": 9}, "layers 3"), ({"library": "cupy"}, "CuPy arrays are on a GPU"),
    ({"device": "cuda", "library": "numpy"}, "not on cuda:0"),
])  # fmt: skip
def test_wrong_arguments(options: dict[str, Any], match: str) -> None:
    usual: dict[str, Any] = {"size": S, "page_size": P, "dtype": "bf16", "head_num": H, "head_dim": D, "layer_num": L}
    with pytest.raises(InvalidArgumentError, match=match):
        MHATokenToKVPool(**(usual | options))


@pytest.mark.parametrize(("name", "parsed"), [
    ("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:3", "cuda:3"), (torch.device("cpu"), "cpu"), (torch.device("cuda:1"),
    "cuda:1"),
])  # fmt: skip
def test_device_names(name: Any, parsed: str) -> None:
    assert arrays.parse_device(name) == parsed


@pytest.mark.parametrize(("dtype", "name"), [
    (torch.bfloat16, "bfloat16"), (np.float16, "float16"), (np.dtype(np.float32), "float32"), ("fp8", "float8_e4m3fn"),
    (torch.float8_e5m2, "float8_e5m2"), (torch.uint8, "uint8"),
])  # fmt: skip
def test_dtype_names(dtype: Any, name: str) -> None:
    assert arrays.canonical_dtype(dtype) == name


# ---- CuPy, played by numpy -------------------------------------------------------------------------------------------
class CupyLike(np.ndarray):
    """numpy memory with CuPy's attributes."""

    device = SimpleNamespace(id=1)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.__array_interface__

    def get(self) -> Any:
        return np.array(self)


class CupyModule(SimpleNamespace):
    chosen: list[int] = []  # noqa: RUF012

    class cuda:
        runtime = SimpleNamespace(getDeviceCount=lambda: 2)

        class Device:
            def __init__(self, number: int) -> None:
                CupyModule.chosen.append(number)

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype).view(CupyLike)

    @staticmethod
    def asarray(array: Any) -> Any:
        return np.asarray(array).view(CupyLike)


def test_a_pool_of_cupy_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", CupyModule())
    monkeypatch.setitem(sys.modules, "torch", None)
    pool = MHATokenToKVPool(S, P, "bf16", H, D, L, "cuda:1")
    assert (pool.library, pool.view().device, set(CupyModule.chosen)) == ("cupy", "cuda:1", {1})
    assert pool.view().bases[0, 2] == pool.k_buffer[2].ctypes.data
    loc = np.array([5, 7])
    rows = np.arange(2 * H * D, dtype=np.uint16).reshape(2, H, D)
    pool.set_kv_buffer(1, loc, rows, rows + 1)
    saved = pool.get_cpu_copy(loc)
    assert (type(saved[0][1]), saved[1][1].tolist()) == (np.ndarray, (rows + 1).tolist())
    pool.load_cpu_copy(saved, loc + 4)
    assert np.array_equal(pool.get_key_buffer(1)[loc + 4], rows)


# ---- machines that lack something ------------------------------------------------------------------------------------
def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    monkeypatch.setitem(sys.modules, name, module)


def test_the_error_for_a_gpu_says_what_each_library_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=no_driver)), __version__="13")
    cpu_build = SimpleNamespace(
        cuda=SimpleNamespace(device_count=lambda: 0), version=SimpleNamespace(cuda=None), __version__="2.9+cpu"
    )
    fake_module(monkeypatch, "cupy", cupy)
    fake_module(monkeypatch, "torch", cpu_build)
    match = r"torch 2\.9\+cpu is a CPU build; cupy finds no GPU .*Insufficient"
    with pytest.raises(DeviceUnavailableError, match=match):
        arrays.choose_library("cuda:0")
    cpu_build.version.cuda = "13.0"
    cpu_build.cuda.device_count = lambda: 2
    assert arrays.choose_library("cuda:1") == "torch"
    with pytest.raises(DeviceUnavailableError, match="sees 2 GPUs, not cuda:2"):
        arrays.choose_library("cuda:2", "torch")
    cupy.cuda.runtime.getDeviceCount = lambda: 3
    assert arrays.choose_library("cuda:2") == "cupy"


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "cupy", "rich", "matplotlib"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def test_everything_but_the_gpu_works_with_neither_torch_nor_cupy() -> None:
    code = BLOCKED + """
import numpy as np
import radixkv
from radixkv.pool.device import MHATokenToKVPool, MLATokenToKVPool
pool = MHATokenToKVPool(32, 4, "bf16", 2, 8, 3)
assert pool.library == "numpy" and isinstance(pool.k_buffer[0], np.ndarray)
assert pool.view().num_slots == 36
for library in (None, "torch", "cupy"):
    try:
        MLATokenToKVPool(32, 4, "bf16", 8, 2, 3, "cuda", library=library)
    except radixkv.DeviceUnavailableError as error:
        print(error)
try:
    MHATokenToKVPool(32, 4, "bf16", 2, 8, 3, library="torch")
except radixkv.DeviceUnavailableError as error:
    print(error)
assert not {"torch", "cupy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert "torch is not installed" in lines[0]
    assert "cupy is not installed" in lines[0]
    assert "works without a GPU" in lines[0]
    assert "cupy" not in lines[1]
    assert "torch" not in lines[2]
    assert "torch tensors on cpu" in lines[3]


def test_importing_the_pools_imports_neither() -> None:
    code = "import radixkv.pool.device, sys; print(sorted({'torch', 'cupy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pool_needs_its_halves() -> None:
    pool = DevicePool(S, "fp32", MHATokenToKVPool(S, P, "fp32", H, D, L).geometry, "cpu", None, "numpy")
    with pytest.raises(NotImplementedError):
        pool.get_contiguous_buf_infos()


def test_moving_tokens_and_another_layers_number() -> None:
    """What speculative decoding calls: the tokens of accepted drafts move together; cross attention names its layer."""
    pool = MHATokenToKVPool(8, 1, torch.float32, H, D, 2, "cpu")
    rows = torch.arange(3 * H * D, dtype=torch.float32).view(3, H, D)
    for layer in range(2):
        pool.set_kv_buffer(SimpleNamespace(layer_id=0), torch.tensor([1, 4, 6]), rows, -rows, layer_id_override=layer)
    pool.move_kv_cache(torch.tensor([4, 1]), torch.tensor([6, 4]))  # 4 is read before it is written
    for key, value in (pool.get_kv_buffer(layer) for layer in range(2)):
        assert torch.equal(key[[1, 4, 6]], rows[[1, 2, 2]])
        assert torch.equal(value[[1, 4, 6]], -rows[[1, 2, 2]])
