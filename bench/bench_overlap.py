"""Loads that overlap with compute: python -m bench.bench_overlap [--quick] [--json FILE] [--png FILE]

A prompt's prefix is on the host; a decoder computes what follows, layer by layer, and each layer waits for its own KV
(``layer_counter.wait_until(layer)``) while load_back copies those behind it. In one run, through HiRadixCache:
    on the device   nothing to load: the floor
    overlapped      load_back and compute at once
    load, compute   all layers are waited for first
    recompute       nothing cached: the whole prompt in chunks
Time to first token from the request's match to the token on the host, the median of the rounds; of the last overlapped
one a timeline: when each layer's copy and compute began and ended. On a GPU these are CUDA events, and the aims are
that something overlapped and that the first token gained by it. On a CPU, with threads, they are the host's clock and
show only that the order is right: copies and compute share its cores. The logits of all four must agree. Seed 7; random
weights, as time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from radixkv.controller import ControllerConfig
from radixkv.controller.mover_cuda import StreamProgress
from radixkv.hicache import HiCacheConfig, HiRadixCache, MHATokenToKVPool, PagedTokenToKVPoolAllocator, ReqToTokenPool
from radixkv.pool.host import HostPoolConfig

from . import report

PAGE = 16
SEED = 7
PATIENCE_S = 60.0
WAYS = ("on the device", "overlapped", "load, compute", "recompute")


@dataclass(frozen=True)
class Shape:
    """Of the model and of the request. new_tokens is the chunk of a prefill, too."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dtype: str
    cached_tokens: int
    new_tokens: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def cached_bytes(self) -> int:
        element = getattr(torch, self.dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * element * self.cached_tokens


SHAPES = {
    "cuda": Shape(32, 4096, 32, 8, "bfloat16", 8192, 1024),  # as Llama 3 8B: 1 GiB of KV
    "cuda quick": Shape(8, 4096, 32, 8, "bfloat16", 4096, 512),
    "cpu": Shape(6, 256, 8, 4, "float32", 4096, 64),
    "cpu quick": Shape(4, 128, 4, 2, "float32", 512, 32),
}


# ---- clocks ----------------------------------------------------------------------------------------------------------
class HostClock:
    """Times of a device whose work is done when its call returns. A thread looks when each layer has arrived."""

    def __init__(self, mover: Any, layers: int) -> None:
        self._copied: list[float] = []
        self._watch: threading.Thread | None = None
        load = mover.load

        def watched(host_pages: Any, device_pages: Any, progress: Any) -> Any:
            self._copied = [time.perf_counter()]
            self._watch = threading.Thread(target=self._look, args=(progress, layers))
            ticket = load(host_pages, device_pages, progress)
            self._watch.start()
            return ticket

        mover.load = watched

    def _look(self, progress: Any, layers: int) -> None:
        for layer in range(layers):
            progress.wait(layer, PATIENCE_S)
            self._copied.append(time.perf_counter())

    def now(self) -> float:
        return time.perf_counter()

    def ms(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def copied(self) -> list[float]:
        """When the copy began, and when each layer of it ended."""
        assert self._watch is not None
        self._watch.join()
        return self._copied

    def synchronize(self) -> None:
        pass


class CudaClock:
    """CUDA events: on torch's current stream, and behind each layer on the stream of the loads."""

    def __init__(self, mover: Any) -> None:
        import cupy

        self._cuda: Any = cupy.cuda
        self._events: list[Any] = []
        loader, stream = mover._loader, mover._load_stream
        load_back = loader.load_back

        def timed(host: Any, device: Any, host_pages: Any, device_pages: Any, progress: Any) -> None:
            self._events = [self._record(stream), *progress.events]
            load_back(host, device, host_pages, device_pages, progress)

        loader.load_back = timed
        mover.new_progress = lambda: StreamProgress(loader.make_progress(timing=True), mover._compute_stream)

    def _record(self, stream: int) -> Any:
        event = self._cuda.Event()
        self._cuda.runtime.eventRecord(event.ptr, stream)
        return event

    def now(self) -> Any:
        return self._record(int(torch.cuda.current_stream().cuda_stream))

    def ms(self, start: Any, end: Any) -> float:
        return float(self._cuda.get_elapsed_time(start, end))

    def copied(self) -> list[Any]:
        return self._events

    def synchronize(self) -> None:
        torch.cuda.synchronize()


# ---- the model -------------------------------------------------------------------------------------------------------
class Decoder:
    """Llama's layers with random weights, without positions, on a paged pool."""

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(SEED)
        self.shape, self.dtype = shape, getattr(torch, shape.dtype)
        wide, kv = shape.hidden, shape.kv_heads * shape.head_dim
        sizes = {"q": (wide, wide), "kv": (wide, 2 * kv), "o": (wide, wide), "up": (wide, 4 * wide),
                 "down": (4 * wide, wide)}  # fmt: skip

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, dtype=self.dtype, device=device) / math.sqrt(rows)

        self.layers = [{name: weight(*size) for name, size in sizes.items()} for _ in range(shape.layers)]
        self.words = weight(256, wide)

    @torch.inference_mode()
    def forward(self, pool: Any, slots: torch.Tensor, tokens: torch.Tensor, first: int, before: Callable[[int], None],
                after: Callable[[int], None]) -> torch.Tensor:  # fmt: skip
        """Compute tokens[first:], whose KV goes to slots[first:]; before(layer) waits. Returns: the last logits."""
        shape, count = self.shape, len(tokens) - first
        seen = torch.ones(count, len(tokens), dtype=torch.bool, device=tokens.device).tril(first)
        x = self.words[tokens[first:]]
        for layer, weights in enumerate(self.layers):
            before(layer)
            normed = F.rms_norm(x, (shape.hidden,))
            q = (normed @ weights["q"]).view(count, shape.heads, -1)
            k, v = (normed @ weights["kv"]).view(count, 2, shape.kv_heads, -1).unbind(1)
            pool.set_kv_buffer(layer, slots[first:], k, v)
            whole = [buffer[layer][slots].repeat_interleave(shape.heads // shape.kv_heads, dim=1).transpose(0, 1)
                     for buffer in (pool.k_buffer, pool.v_buffer)]  # fmt: skip
            attended = F.scaled_dot_product_attention(q.transpose(0, 1)[None], whole[0][None], whole[1][None], seen)
            x = x + attended[0].transpose(0, 1).reshape(count, -1) @ weights["o"]
            x = x + F.silu(F.rms_norm(x, (shape.hidden,)) @ weights["up"]) @ weights["down"]
            after(layer)
        return x[-1] @ self.words.T


# ---- requests --------------------------------------------------------------------------------------------------------
class Bench:
    """One cache and one prompt, served in several ways."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.model = shape, Decoder(shape, device)
        total = shape.cached_tokens + shape.new_tokens
        self.pool = MHATokenToKVPool(
            total + PAGE, PAGE, self.model.dtype, shape.kv_heads, shape.head_dim, shape.layers, device, library="torch"
        )
        self.allocator = PagedTokenToKVPoolAllocator(
            self.pool.size, PAGE, self.model.dtype, self.pool.device, self.pool
        )
        control = ControllerConfig(load_back_threshold=1)
        config = HiCacheConfig(control=control, host_pool=HostPoolConfig(headroom_bytes=0))
        self.cache: Any = HiRadixCache(
            ReqToTokenPool(1, total, self.pool.device), self.allocator, None, PAGE, 1.0, 0, "write_through", "direct",
            "page_first_direct", config=config,
        )  # fmt: skip
        core = self.cache.cache_controller.core
        self.layers, self.counter = core.layer_counter, self.cache.cache_controller.layer_done_counter
        self.pool.layer_transfer_counter = None  # this model waits by itself
        self.on_gpu = device != "cpu"
        mover = core._context.mover
        self.clock: Any = CudaClock(mover) if self.on_gpu else HostClock(mover, shape.layers)
        generator = torch.Generator().manual_seed(SEED)
        self.tokens = torch.randint(0, 256, (total,), generator=generator)
        self.on_device = self.tokens.to(device)
        self.key = self.tokens[: shape.cached_tokens].tolist()
        self.timeline: list[dict[str, float]] = []

    def fill(self) -> None:
        """Compute the prefix once; its KV goes to the host."""
        slots = self.allocator.alloc(self.shape.cached_tokens)
        self._prefill(slots, self.shape.cached_tokens)
        self.cache.insert(self.key, slots)
        self._until(lambda: not self.cache.cache_controller.core.stats().writes_in_flight)

    def _prefill(self, slots: torch.Tensor, end: int) -> torch.Tensor:
        """In chunks, from nothing."""
        step = self.shape.new_tokens
        for first in range(0, end, step):
            upto = min(first + step, end)
            logits = self.model.forward(self.pool, slots[:upto], self.on_device[:upto], first, _nothing, _nothing)
        return logits

    def serve(self, way: str) -> tuple[float, torch.Tensor]:
        """One request. Returns: seconds to the first token, and its logits."""
        if way != "on the device":
            self.cache.evict(self.pool.size)
        self.clock.synchronize()
        began_s, began = time.perf_counter(), self.clock.now()
        if way == "recompute":
            slots = self.allocator.alloc(len(self.tokens))
            logits = self._prefill(slots, len(self.tokens))
            logits.argmax().item()
            took_s = time.perf_counter() - began_s
            self.allocator.free(slots)
            return took_s, logits
        found = self.cache.match_prefix(self.key)
        loaded, node = self.cache.init_load_back(found.last_host_node, found.host_hit_length)
        node = node if len(loaded) else found.last_device_node
        self.cache.inc_lock_ref(node)
        prefix = torch.cat([found.device_indices, loaded])
        assert len(prefix) == self.shape.cached_tokens, f"{len(prefix)} of {self.shape.cached_tokens} tokens are cached"
        assert bool(len(loaded)) == (way != "on the device")
        index = self.cache.ready_to_load_host_cache()
        self.counter.set_consumer(index)
        if way == "load, compute":
            self.layers.wait(self.shape.layers - 1, PATIENCE_S, index - 1)
            self.clock.synchronize()
        new = self.allocator.alloc(self.shape.new_tokens)
        starts, ends = [], []

        def before(layer: int) -> None:
            self.counter.wait_until(layer)
            starts.append(self.clock.now())

        logits = self.model.forward(
            self.pool, torch.cat([prefix, new]), self.on_device, len(prefix), before,
            lambda layer: ends.append(self.clock.now()),
        )  # fmt: skip
        logits.argmax().item()
        took_s = time.perf_counter() - began_s
        self.counter.set_consumer(0)
        if way == "overlapped":
            copied = self.clock.copied()
            self.timeline = [
                {name: self.clock.ms(began, event) for name, event in (
                    ("copy_start_ms", copied[at]), ("copy_end_ms", copied[at + 1]), ("compute_start_ms", starts[at]),
                    ("compute_end_ms", ends[at]))} for at in range(self.shape.layers)
            ]  # fmt: skip
        self._until(lambda: not self.cache.cache_controller.core.stats().loads_in_flight)
        self.cache.dec_lock_ref(node)
        self.allocator.free(new)
        return took_s, logits

    def _until(self, done: Callable[[], bool]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end_s, self.cache.cache_controller.core.stats()
            self.cache.check_hicache_events()
            time.sleep(0.0002)

    def close(self) -> None:
        self.cache.close()


def _nothing(layer: int) -> None:
    pass


# ---- figures ---------------------------------------------------------------------------------------------------------
def overlap_ms(timeline: list[dict[str, float]]) -> float:
    """How long a copy and a layer's compute ran at once."""
    begin, end = timeline[0]["copy_start_ms"], timeline[-1]["copy_end_ms"]
    return sum(max(0.0, min(end, row["compute_end_ms"]) - max(begin, row["compute_start_ms"])) for row in timeline)


def picture(timeline: list[dict[str, float]], width: int = 100) -> str:
    """Layer by layer: = its copy, # its compute, from the request's arrival."""
    last = max(max(row.values()) for row in timeline)
    lines = []
    for layer, row in enumerate(timeline):
        line = [" "] * (width + 1)
        for mark, name in (("=", "copy"), ("#", "compute")):
            at = [int(width * max(0.0, row[f"{name}_{end}_ms"]) / last) for end in ("start", "end")]
            line[at[0] : at[1] + 1] = mark * (at[1] + 1 - at[0])
        lines.append(f"{layer:3d} |{''.join(line).rstrip()}")
    return "\n".join([*lines, f"     0 ms{f'{last:.2f} ms':>{width - 4}}", "     = copied from the host   # computed"])


def plot(timeline: list[dict[str, float]], path: Path, title: str) -> None:
    """The same as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5))
    for name, colour, shift in (("copy", "tab:blue", 0.2), ("compute", "tab:orange", -0.2)):
        start = [row[f"{name}_start_ms"] for row in timeline]
        length = [row[f"{name}_end_ms"] - row[f"{name}_start_ms"] for row in timeline]
        axes.barh([layer - shift for layer in range(len(timeline))], length, 0.4, start, color=colour, label=name)
    axes.invert_yaxis()
    axes.set(xlabel="ms since the request's match", ylabel="layer", title=title)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def measure(shape: Shape, device: str, rounds: int) -> dict[str, Any]:
    """All ways in turn, ``rounds`` times after one that is not counted."""
    bench = Bench(shape, device)
    try:
        bench.fill()
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        logits: dict[str, torch.Tensor] = {}
        for turn in range(rounds + 1):
            for way in ("overlapped", "on the device", "load, compute", "recompute"):
                took_s, logits[way] = bench.serve(way)
                if turn:
                    times[way].append(took_s)
        wanted = logits["recompute"].float()
        for way, found in logits.items():
            assert torch.allclose(found.float(), wanted, rtol=0.05, atol=0.05), f"{way}: other logits than recomputed"
        same = {way: bool(torch.equal(found, logits["recompute"])) for way, found in logits.items()}
        timeline = bench.timeline
    finally:
        bench.close()
    last = timeline[-1]
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "CPU (threads)", "seed": SEED,
        "clock": "CUDA events" if device != "cpu" else "the host's clock", "shape": asdict(shape), "rounds": rounds,
        "cached_bytes": shape.cached_bytes,
        "first_token_ms": {way: 1e3 * statistics.median(times[way]) for way in WAYS},
        "first_token_ms_all": {way: [1e3 * took_s for took_s in times[way]] for way in WAYS},
        "same_bits_as_recomputed": same, "copy_ms": last["copy_end_ms"] - timeline[0]["copy_start_ms"],
        "compute_ms": sum(row["compute_end_ms"] - row["compute_start_ms"] for row in timeline),
        "overlap_ms": overlap_ms(timeline), "timeline": timeline,
    }  # fmt: skip


def checks(found: dict[str, Any], on_gpu: bool) -> list[report.Check]:
    """On a GPU copy and compute are under way at once, and the first token gains by it. On a CPU there are no aims."""
    first_ms = found["first_token_ms"]
    gained = first_ms["overlapped"] / first_ms["load, compute"]
    alone = 1 - found["overlap_ms"] / found["copy_ms"]
    return [
        report.Check("first token, overlapped / load, then compute", gained, 0.999 if on_gpu else None, "x"),
        report.Check("share of the copy with no compute beside it", alone, 0.999 if on_gpu else None, "x"),
    ]


def main() -> None:
    """Command line. See report.conclude for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="smaller, fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    report.add_check_option(parser)
    parser.add_argument("--png", type=Path, help="the timeline as a picture; needs matplotlib")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    if not on_gpu:
        print("no GPU: the CPU path, whose copies and compute share the cores. Times say nothing of a GPU.")
    shape = SHAPES[("cuda" if on_gpu else "cpu") + " quick" * options.quick]
    found = measure(shape, options.device, options.rounds or (3 if options.quick else 10))
    print(f"{found['device']}: {shape.cached_tokens} tokens cached ({shape.cached_bytes / 2**20:.0f} MiB), "
          f"{shape.new_tokens} computed, {shape.layers} layers; time to first token")  # fmt: skip
    for way, took_ms in found["first_token_ms"].items():
        print(f"  {way:15s} {took_ms:9.2f} ms")
    print(f"copy {found['copy_ms']:.2f} ms, compute {found['compute_ms']:.2f} ms, at once {found['overlap_ms']:.2f} ms")
    print(picture(found["timeline"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        plot(found["timeline"], options.png, f"{found['device']}: load_back under compute")
    report.conclude(checks(found, on_gpu), options.check)


if __name__ == "__main__":
    main()
