"""L5: KV events in the shape of SGLang's classes, so that an engine's own publisher can send them.

There a page is named by Python's hash of its own tokens, and every split removes and stores pages that never moved.
Here the name is the first 8 bytes of the page's chained digest, so equal pages after different prefixes differ, as
consumers expect, and events are of pages that entered or left a tier. Names are int64, as Python's hashes are there.
"""

from __future__ import annotations

from typing import Any

from ..types import Event

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "KVCacheEvent", "to_engine_event"]

try:
    import msgspec
except ImportError:  # then they are plain values, which no msgspec encoder will be asked for
    from dataclasses import dataclass

    class KVCacheEvent:
        """Base of the events."""

    @dataclass(slots=True)
    class BlockStored(KVCacheEvent):
        """Pages entered a tier."""

        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None = None

    @dataclass(slots=True)
    class BlockRemoved(KVCacheEvent):
        """Pages left a tier."""

        block_hashes: list[int]
        medium: str | None = None

    @dataclass(slots=True)
    class AllBlocksCleared(KVCacheEvent):
        """Everything is gone."""

else:

    class KVCacheEvent(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):  # type: ignore[no-redef]
        """Base of the events; on the wire an array whose first item is the class's name."""

    class BlockStored(KVCacheEvent):  # type: ignore[no-redef]
        """Pages entered a tier. medium: "GPU" or "CPU"."""

        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None = None

    class BlockRemoved(KVCacheEvent):  # type: ignore[no-redef]
        """Pages left a tier."""

        block_hashes: list[int]
        medium: str | None = None

    class AllBlocksCleared(KVCacheEvent):  # type: ignore[no-redef]
        """Everything is gone."""


_MEDIA = {"device": "GPU", "host": "CPU", None: None}


def to_engine_event(event: Event) -> Any:
    """One event of the tree, which is of one page."""
    if event.kind == "cleared":
        return AllBlocksCleared()
    medium = _MEDIA[event.medium]
    name = _int64(event.key)
    if event.kind == "removed":
        return BlockRemoved([name], medium)
    assert event.tokens is not None
    parent = None if event.parent_key is None else _int64(event.parent_key)
    return BlockStored([name], parent, event.tokens.tolist(), len(event.tokens), None, medium)


def _int64(key: int) -> int:
    return key - (1 << 64) if key >= 1 << 63 else key
