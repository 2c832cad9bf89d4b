"""Read radixkv.h: functions, table entries, structs. A small parser for the one style that the header is written in."""

from __future__ import annotations

import re
from typing import NamedTuple

from .toolchain import INCLUDE

HEADER = INCLUDE / "radixkv" / "radixkv.h"


class Struct(NamedTuple):
    name: str
    fields: list[str]


def _code() -> str:
    text = HEADER.read_text()
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"^\s*#.*(?:\\\n.*)*$", "", text, flags=re.MULTILINE)


def functions() -> list[str]:
    """Names of the exported functions, in order."""
    return re.findall(r"RKV_API\b[^;(]*?\b(rkv_\w+)\s*\(", _code())


def structs() -> list[Struct]:
    """Every struct with its field names, in order."""
    found = []
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\}\s*(\w+);", _code(), flags=re.DOTALL):
        fields = [_field(part) for part in body.split(";") if part.strip()]
        found.append(Struct(name, fields))
    return found


def enumerators() -> list[str]:
    """Names of all enum constants."""
    return [
        part.split("=")[0].strip()
        for body in re.findall(r"enum\s*\{(.*?)\}", _code(), flags=re.DOTALL)
        for part in body.split(",")
        if part.strip()
    ]


def table() -> list[str]:
    """Fields of rkv_api that are functions, in order."""
    [api] = [struct for struct in structs() if struct.name == "rkv_api"]
    return api.fields[2:]


def _field(declaration: str) -> str:
    pointer = re.search(r"\(\s*\*\s*(\w+)\s*\)\s*\(", declaration)
    if pointer:
        return pointer[1]
    name = re.search(r"(\w+)\s*(?:\[\w+\])?\s*$", declaration)
    assert name is not None, declaration
    return name[1]
