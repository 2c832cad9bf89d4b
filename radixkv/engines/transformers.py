"""L5: runs a decoder of transformers on a paged KV pool, so that its logits do not depend on what was cached.

Floating-point results depend on the shapes of the matrices that are multiplied: the KV of a token computed alone and in
a batch of 32 differ in the last bits, and no check of bytes can then tell a stale page from a rounding. So every
forward pass here has one shape: a *chunk* of C tokens that begins at a multiple of C, its last rows padded.

    tokens       0 ........ C ........ 2C ........ 3C
    prefill      [ chunk 0 ][ chunk 1 ][ chunk 2 ]           whatever is cached of a chunk is read, not written
    hit of h     [ read    ][ read ][ h: computed]           rows before h are taken from the pool
    decode       [                  ][ n - 1: one row kept]  the chunk again, with one row more

A row depends on the rows before it only (the mask makes the others' weights exactly 0), and each row of a product on
its own row only. So the KV and the logits of token i are the same bits whether it was prefilled, decoded, computed
after a hit of any length, or recomputed from nothing: "the same chunk boundaries" hold by construction. C = 1 would be
the usual decode; a larger C reads the weights once for more tokens.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache

from ..errors import InvalidArgumentError
from ..pool.device import MHATokenToKVPool

__all__ = ["PagedRunner", "Slots", "page_fingerprints"]

Slots: TypeAlias = Any
"""int64 torch tensor [n]: the slot of each token of a sequence, in order."""


class _PagedCache(Cache):  # type: ignore[misc]
    """What attention reads and writes in one forward pass of one chunk, layer by layer.

    Args:
        written: tokens whose KV is in the pool; the chunk's rows before it are read, those from it on are new.
        end: one past the last token of the chunk that is no padding.
    """

    is_compileable = False

    def __init__(self, pool: Any, slots: Slots, start: int, written: int, end: int) -> None:
        self._pool, self._start = pool, start
        self._read, self._write = slots[:written], slots[written:end]
        self._new = slice(written - start, end - start)
        self.layers: list[Any] = []  # read by the base class where it knows of no method overridden here

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write the new rows [1, H, C, D] to their slots; return K and V of the whole sequence and the padding.

        Reading a layer's buffer waits for its load, if one is in flight (``DevicePool.register_layer_...``).
        """
        pool, new = self._pool, self._new
        halves = pool.get_kv_buffer(layer_idx + pool.start_layer)
        rows = [states[0].transpose(0, 1) for states in (key_states, value_states)]  # [C, H, D]
        pool.set_kv_buffer(layer_idx + pool.start_layer, self._write, rows[0][new], rows[1][new])
        whole = [torch.cat([half[self._read], own[new.start :]]) for half, own in zip(halves, rows, strict=True)]
        return whole[0].transpose(0, 1)[None], whole[1].transpose(0, 1)[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk."""
        return self._start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self._start + query_length, 0


class PagedRunner:
    """One model, which computes on the slots that it is given. Not thread-safe.

    Args:
        model: a causal LM of transformers with full attention in every layer, in eval mode.
        page_size: P, of the pools it will run on.
        chunk_tokens: C, a multiple of page_size.
    Raises: InvalidArgumentError for another C, or a model with sliding-window or latent attention, whose KV these pools
        do not hold.
    """

    def __init__(self, model: Any, page_size: int, chunk_tokens: int) -> None:
        if chunk_tokens < 1 or page_size < 1 or chunk_tokens % page_size:
            raise InvalidArgumentError(f"a chunk of {chunk_tokens} tokens is not one or more pages of {page_size}")
        config = model.config
        other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if other or getattr(config, "kv_lora_rank", None):
            raise InvalidArgumentError(f"{config.model_type} has layers with {', '.join(sorted(other)) or 'latent KV'}")
        self.model, self.page_size, self.chunk_tokens = model, page_size, chunk_tokens
        self.num_layers = int(config.num_hidden_layers)
        self.num_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None)
        self.head_dim = int(head_dim or config.hidden_size // config.num_attention_heads)
        self.max_tokens = int(config.max_position_embeddings) // chunk_tokens * chunk_tokens
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device

    def new_pool(self, num_tokens: int) -> MHATokenToKVPool:
        """A device pool for this model: ``num_tokens`` slots (whole pages), and the page of padding."""
        return MHATokenToKVPool(
            num_tokens, self.page_size, self.dtype, self.num_heads, self.head_dim, self.num_layers, str(self.device),
            library="torch",
        )  # fmt: skip

    def identity(self) -> str:
        """Names the model by what its KV depends on: architecture, and every weight. Two models with one name have the
        same KV; it goes into the namespace of storage. Reads all weights once."""
        digest = hashlib.blake2b(repr(sorted(self.model.config.to_dict().items(), key=str)).encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(f"chunk={self.chunk_tokens}".encode())
        if self.device.type != "cpu":  # other bits: what one of them has stored is not for the other
            digest.update(torch.cuda.get_device_name(self.device).encode())
        return f"{self.model.config.model_type}-{digest.hexdigest()}"

    def forward(self, pool: Any, slots: Slots, tokens: npt.NDArray[np.int32], written: int) -> Any:
        """Run one chunk: compute what follows ``written``, up to the chunk's end or the last token.

        Args:
            slots: of at least as many tokens as are computed; slots[written:] are written, those before only read.
            tokens: the whole sequence.
            written: tokens whose KV is in the pool, fewer than len(tokens).
        Returns: logits [n, vocabulary] of the tokens written .. written + n - 1.
        """
        size = self.chunk_tokens
        start = written // size * size
        end = min(start + size, len(tokens))
        if not 0 <= written < len(tokens) or len(slots) < end or start + size > self.max_tokens:
            raise InvalidArgumentError(
                f"{written} of {len(tokens)} tokens computed, {len(slots)} slots, at most {self.max_tokens} positions"
            )
        chunk = torch.zeros(1, size, dtype=torch.int64, device=self.device)  # padding: token 0, whose KV nobody reads
        chunk[0, : end - start] = torch.from_numpy(np.asarray(tokens[start:end], np.int64))
        cache = _PagedCache(pool, slots, start, written, end)
        positions = torch.arange(start, start + size, device=self.device)[None]
        with torch.inference_mode():
            out = self.model(input_ids=chunk, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.logits[0, written - start : end - start]

    def prefill(self, pool: Any, slots: Slots, tokens: npt.NDArray[np.int32], cached_tokens: int) -> Any:
        """Compute all tokens from ``cached_tokens`` (fewer than all) on. Returns: their logits [n, vocabulary]."""
        rows, done = [], cached_tokens
        while done < len(tokens):
            rows.append(self.forward(pool, slots, tokens, done))
            done += len(rows[-1])
        return torch.cat(rows)


def page_fingerprints(pool: Any, slots: Slots) -> list[str]:
    """A digest of each page's KV, all layers of K and V, as it is in the pool now.

    Logits alone would not do: attention adds up over the keys, so that pages in a wrong order change rounding at most.

    Args: slots: of whole pages.
    """
    num_pages = len(slots) // pool.page_size
    buffers = [half[layer] for half in (pool.k_buffer, pool.v_buffer) for layer in range(pool.layer_num)]
    rows = [buffer[slots].reshape(num_pages, -1).view(torch.uint8).cpu().numpy() for buffer in buffers]
    digests = [hashlib.blake2b(digest_size=8) for _ in range(num_pages)]
    for row in rows:
        for digest, page in zip(digests, row, strict=True):
            digest.update(page.data)
    return [digest.hexdigest() for digest in digests]
