"""L1: from what a caller calls a namespace to the bytes that identify one."""

from __future__ import annotations

from typing import TypeAlias

from .errors import ArgumentTypeError

__all__ = ["NamespacePart", "encode_namespace"]

NamespacePart: TypeAlias = str | bytes | int | None


def encode_namespace(extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> bytes:
    """Encode (extra_key, cache_salt) injectively: two namespaces are equal exactly when their encodings are.

    The default namespace (None, None) is ``b""``. Else each part is a tag (n, s, b, i), and for s, b and i the length
    of the payload as 8 bytes little endian, then the payload (UTF-8, raw, hexadecimal). None, "", b"" and 0 all differ.

    Raises:
        ArgumentTypeError: a part is not None, str, bytes or int (bool is refused: True would collide with 1).
    """
    if extra_key is None and cache_salt is None:
        return b""
    return _encode_part(extra_key) + _encode_part(cache_salt)


def _encode_part(part: NamespacePart) -> bytes:
    if part is None:
        return b"n"
    if isinstance(part, str):
        tag, payload = b"s", part.encode("utf-8", "surrogatepass")
    elif isinstance(part, bytes):
        tag, payload = b"b", part
    elif isinstance(part, int) and not isinstance(part, bool):
        tag, payload = b"i", f"{part:x}".encode("ascii")  # not decimal: int to str has a limit of digits
    else:
        raise ArgumentTypeError(f"a namespace part is None, str, bytes or int, not {type(part).__name__}")
    return tag + len(payload).to_bytes(8, "little") + payload
