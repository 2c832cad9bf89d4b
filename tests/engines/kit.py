"""Small models, and sequences on a pool in shuffled slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from radixkv.engines.models import ChatModel, RandomConfig, random_llama
from radixkv.engines.transformers import PagedRunner

TINY = RandomConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024, initializer_range=1 / 8,
)  # fmt: skip


def tiny() -> ChatModel:
    return random_llama(TINY)


def runner(chunk_tokens: int = 16, page_size: int = 8) -> PagedRunner:
    return PagedRunner(tiny().model, page_size, chunk_tokens)


def slots_of(pages: list[int], page_size: int) -> Any:
    return (torch.tensor(pages)[:, None] * page_size + torch.arange(page_size)).reshape(-1)


def shuffled_slots(num_pages: int, page_size: int, seed: int) -> Any:
    """Slots of all pages but the one of padding, in an order that no arithmetic gives."""
    return slots_of((np.random.default_rng(seed).permutation(num_pages) + 1).tolist(), page_size)


def random_tokens(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, count).astype(np.int32)
