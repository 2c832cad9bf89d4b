"""Logits and KV are the same bits whatever was cached, and differ as soon as what was cached is wrong."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from radixkv.engines.transformers import PagedRunner, page_fingerprints
from radixkv.errors import InvalidArgumentError

from . import kit
from .kit import random_tokens, runner, shuffled_slots

PAGES = 40


@pytest.fixture(scope="module")
def run() -> PagedRunner:
    return runner()


def recompute(run: PagedRunner, tokens: np.ndarray) -> tuple[object, object, object]:
    """Logits of all tokens from nothing, and the pool with its slots."""
    pool = run.new_pool(PAGES * run.page_size)
    slots = shuffled_slots(PAGES, run.page_size, 1)
    return run.prefill(pool, slots, tokens, 0), pool, slots


@pytest.mark.parametrize("hit", [0, 8, 16, 24, 56, 96, 99, 100])
def test_a_hit_of_any_length_gives_the_bits_of_recomputation(run: PagedRunner, hit: int) -> None:
    tokens = random_tokens(101, 2)
    logits, pool, slots = recompute(run, tokens)
    other = run.new_pool(PAGES * run.page_size)
    elsewhere = shuffled_slots(PAGES, run.page_size, 3)
    for buffers, found in zip((other.k_buffer, other.v_buffer), (pool.k_buffer, pool.v_buffer), strict=True):
        for buffer, source in zip(buffers, found, strict=True):
            buffer[:] = float("nan")  # whatever is read but was not cached shows
            buffer[elsewhere[:hit]] = source[slots[:hit]]
    again = run.prefill(other, elsewhere, tokens, hit)
    assert torch.equal(again, logits[hit:])
    assert page_fingerprints(other, elsewhere[:96]) == page_fingerprints(pool, slots[:96])


def test_decoding_gives_the_bits_of_prefilling(run: PagedRunner) -> None:
    tokens = random_tokens(70, 4)
    logits, pool, slots = recompute(run, tokens)
    other = run.new_pool(PAGES * run.page_size)
    rows = [run.prefill(other, slots, tokens[:33], 0)]
    rows += [run.forward(other, slots, tokens[: n + 1], n) for n in range(33, 70)]
    assert all(len(row) == 1 for row in rows[1:])
    assert torch.equal(torch.cat(rows), logits)
    assert page_fingerprints(other, slots[:64]) == page_fingerprints(pool, slots[:64])


def test_a_longer_sequence_does_not_change_the_shorter_one(run: PagedRunner) -> None:
    tokens = random_tokens(100, 5)
    assert torch.equal(recompute(run, tokens)[0][:50], recompute(run, tokens[:50])[0])


def test_chunks_are_close_to_one_pass_of_the_model(run: PagedRunner) -> None:
    tokens = random_tokens(90, 6)
    with torch.inference_mode():
        whole = run.model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    assert torch.allclose(recompute(run, tokens)[0], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", ["k_buffer", "v_buffer"])
def test_one_wrong_bit_of_a_cached_page_changes_the_logits(run: PagedRunner, half: str) -> None:
    tokens = random_tokens(64, 7)
    logits, pool, slots = recompute(run, tokens)
    before = page_fingerprints(pool, slots[:48])
    element = getattr(pool, half)[1][slots[20]].view(torch.int32)  # [H, D]
    element[0, 3] ^= 1 << 20  # an upper bit of one mantissa of one layer
    assert not torch.equal(run.prefill(pool, slots, tokens, 48), logits[48:])
    after = page_fingerprints(pool, slots[:48])
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [20 // run.page_size]


def test_fingerprints_tell_pages_in_a_wrong_order(run: PagedRunner) -> None:
    tokens = random_tokens(48, 8)
    _, pool, slots = recompute(run, tokens)
    right = page_fingerprints(pool, slots[:48])
    assert len(set(right)) == 6
    swapped = torch.cat([slots[8:16], slots[:8], slots[16:48]])
    assert page_fingerprints(pool, swapped) == [right[1], right[0], *right[2:]]


def test_only_new_slots_are_written(run: PagedRunner) -> None:
    tokens = random_tokens(60, 9)
    pool = run.new_pool(PAGES * run.page_size)
    slots = shuffled_slots(PAGES, run.page_size, 10)
    run.prefill(pool, slots, tokens[:40], 0)
    before = [buffer.clone() for buffer in pool.k_buffer]
    run.prefill(pool, slots, tokens, 40)
    written = torch.zeros(len(before[0]), dtype=torch.bool)
    written[slots[40:60]] = True
    for buffer, old in zip(pool.k_buffer, before, strict=True):
        assert torch.equal(buffer[~written], old[~written])
        assert (buffer[written] != old[written]).any(dim=(1, 2)).all()


def test_a_layer_is_not_read_before_it_is_loaded(run: PagedRunner) -> None:
    class Counter:
        """Lets layers through one by one, as the test says."""

        def __init__(self) -> None:
            self.asked: list[int] = []
            self.gates = [threading.Event() for _ in range(run.num_layers)]

        def wait_until(self, layer: int) -> None:
            if layer not in self.asked:
                self.asked.append(layer)
            assert self.gates[layer].wait(10)

    tokens = random_tokens(30, 11)
    logits, pool, slots = recompute(run, tokens)
    saved = [[buffer.clone() for buffer in half] for half in (pool.k_buffer, pool.v_buffer)]
    for half in (pool.k_buffer, pool.v_buffer):
        for buffer in half:
            buffer.zero_()
    counter = Counter()
    pool.register_layer_transfer_counter(counter)
    found: list[object] = []
    model = threading.Thread(target=lambda: found.append(run.prefill(pool, slots, tokens, 24)))
    model.start()
    for layer, gate in enumerate(counter.gates):  # the load: a layer arrives, then the model may go on to it
        for half, rows in zip((pool.k_buffer, pool.v_buffer), saved, strict=True):
            half[layer][slots[:24]] = rows[layer][slots[:24]]
        gate.set()
    model.join(20)
    assert counter.asked == list(range(run.num_layers))
    assert torch.equal(found[0], logits[24:])


@pytest.mark.parametrize(("page_size", "chunk"), [(8, 12), (8, 0), (0, 8), (16, 8)])
def test_chunks_are_whole_pages(page_size: int, chunk: int) -> None:
    with pytest.raises(InvalidArgumentError, match="chunk"):
        runner(chunk, page_size)


def test_what_does_not_fit_is_refused(run: PagedRunner) -> None:
    pool = run.new_pool(PAGES * run.page_size)
    slots = shuffled_slots(PAGES, run.page_size, 12)
    tokens = random_tokens(50, 13)
    for given, written in ((slots[:40], 35), (slots, 50), (slots, -1)):
        with pytest.raises(InvalidArgumentError, match="of 50 tokens"):
            run.forward(pool, given, tokens, written)
    with pytest.raises(InvalidArgumentError, match="at most 1024"):
        run.forward(pool, slots, random_tokens(1025, 1), 1024)


def test_a_model_with_other_attention_is_refused(run: PagedRunner) -> None:
    model = kit.tiny().model
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(InvalidArgumentError, match="sliding_attention"):
        PagedRunner(model, 8, 16)


def test_identity_names_weights_and_chunks(run: PagedRunner) -> None:
    assert run.identity() == runner().identity()
    names = {run.identity(), runner(8).identity(), PagedRunner(kit.random_llama().model, 8, 16).identity()}
    other = kit.tiny().model
    other.lm_head.weight.data[5, 5] += 1
    names.add(PagedRunner(other, 8, 16).identity())
    assert len(names) == 4
