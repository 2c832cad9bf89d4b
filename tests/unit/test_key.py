"""encode_namespace: injective, stable, and strict about types."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.errors import ArgumentTypeError
from radixkv.key import encode_namespace

PARTS = [None, "", "a", "b", "n", "0", "None", b"", b"a", b"n", b"0", 0, 1, -1, 10, 2**64, -(2**64), "é",
         "\x00", b"\x00", "\ud800",
         "s\x01\x00\x00\x00\x00\x00\x00\x00a", b"n" * 9]  # fmt: skip

parts = st.none() | st.text() | st.binary() | st.integers()


def test_the_default_namespace_is_empty() -> None:
    assert encode_namespace() == encode_namespace(None, None) == b""


def test_the_documented_form() -> None:
    eight = (1).to_bytes(8, "little")
    assert encode_namespace("a") == b"s" + eight + b"a" + b"n"
    assert encode_namespace(None, "a") == b"n" + b"s" + eight + b"a"
    assert encode_namespace(b"\xff", 7) == b"b" + eight + b"\xff" + b"i" + eight + b"7"
    assert encode_namespace(-12) == b"i" + (2).to_bytes(8, "little") + b"-c" + b"n"
    assert len(encode_namespace(10**5000)) > 4000, "beyond the digits that int allows in decimal"
    assert encode_namespace("é") == b"s" + (2).to_bytes(8, "little") + "é".encode() + b"n"


def test_different_names_have_different_encodings() -> None:
    pairs = list(itertools.product(PARTS, PARTS))
    assert len({encode_namespace(*pair) for pair in pairs}) == len(pairs)


@given(parts, parts, parts, parts)
def test_injective(a: Any, b: Any, c: Any, d: Any) -> None:
    same = (type(a), a, type(b), b) == (type(c), c, type(d), d)
    assert (encode_namespace(a, b) == encode_namespace(c, d)) == same


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_the_border_between_the_parts_is_in_the_encoding(a: bytes, b: bytes) -> None:
    whole = a + b
    encodings = {encode_namespace(whole[:at], whole[at:]) for at in range(len(whole) + 1)}
    assert len(encodings) == len(whole) + 1


@pytest.mark.parametrize("bad", [True, False, 1.0, ["a"], ("a",), bytearray(b"a"), memoryview(b"a"), np.int64(1)])
def test_other_types_are_refused(bad: Any) -> None:
    for names in ((bad, None), (None, bad), ("a", bad), (bad, "a")):
        with pytest.raises(ArgumentTypeError, match=type(bad).__name__):
            encode_namespace(*names)


def test_subclasses_of_str_are_str() -> None:
    class Name(str):
        pass

    assert encode_namespace(Name("a")) == encode_namespace("a")
