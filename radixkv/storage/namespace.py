"""L2: everything that the bytes of a page depend on besides its tokens, as a digest that goes into every key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ..errors import InvalidArgumentError
from ..pool.layout import KVGeometry
from .envelope import FORMAT_VERSION

__all__ = ["PageNamespace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageNamespace:
    """What a page of KV is a function of, besides tokens and tenant. Engines share pages exactly if these are equal.

    Heads and layers are those of the bytes, not ranks: two ranks of 8 that hold heads 0 .. 3 of 32 share with one rank
    of 16 or of 4 that holds the same. MLA has one latent head, so that all ranks share what rank 0 stored.

    Args:
        model: name and revision, or a digest of the weights: whatever changes when KV would.
        dtype: of one element, with its quantisation: "bfloat16", "fp8_e4m3 scale=1.0".
        kind: "mha" or "mla".
        page_dims: the order of a flat page's dimensions, as ``HostKVCache.page_dims``; layouts of equal order share.
        page_size: tokens a page.
        head_bytes: of one head of one token (one latent row for MLA).
        first_layer, num_layers: the layers in a page, counted through the model (pipeline stages hold parts of it).
        first_head, num_heads: the KV heads in a page, counted through the model; MLA: 0 and 1.
        hash_name: of the page digests: "sha256" for the chain of SGLang.
        extra: whatever else KV depends on: rotary scaling, draft model, adapter set.
    """

    model: str
    dtype: str
    kind: str
    page_dims: str
    page_size: int
    head_bytes: int
    num_layers: int
    first_layer: int = 0
    num_heads: int = 1
    first_head: int = 0
    hash_name: str = "sha256"
    extra: str = ""

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidArgumentError("a namespace without a model: KV of two models would share keys")
        for name in ("page_size", "head_bytes", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.first_layer < 0 or self.first_head < 0:
            raise InvalidArgumentError(f"first_layer {self.first_layer}, first_head {self.first_head}")

    @classmethod
    def of_geometry(cls, geometry: KVGeometry, page_dims: str, *, model: str, dtype: str, tp_rank: int = 0,
                    tp_size: int = 1, first_layer: int = 0, first_head: int | None = None,
                    extra: str = "") -> PageNamespace:  # fmt: skip
        """Of a host pool: ``of_geometry(pool.geometry, pool.page_dims, ...)``.

        Args: first_head: by default tp_rank * num_heads, and only engines of as many ranks share: of 4 heads, rank 2 of
            4 holds head 2, but rank 2 of 8 head 1, as heads are replicated. Who gives it shares by heads alone.
        """
        g = geometry
        if first_head is None:
            first_head = 0 if g.kind == "mla" else tp_rank * g.num_heads
            if g.kind == "mha" and tp_size > 1:
                extra = f"ranks={tp_size};{extra}"
        return cls(
            model=model, dtype=dtype, kind=g.kind, page_dims=page_dims, page_size=g.page_size, head_bytes=g.head_bytes,
            num_layers=g.num_layers, first_layer=first_layer, num_heads=g.num_heads, first_head=first_head, extra=extra,
        )  # fmt: skip

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        halves = 2 if self.kind == "mha" else 1
        return halves * self.num_layers * self.num_heads * self.head_bytes * self.page_size

    def digest(self, salt: bytes = b"") -> bytes:
        """16 bytes, the same in every process and on every machine. Args: salt: a request's ``encode_namespace``."""
        fields = {"format": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
        length = len(text).to_bytes(8, "little")
        return hashlib.blake2b(length + text + salt, digest_size=16, person=b"radixkv page key").digest()
