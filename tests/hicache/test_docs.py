"""The example of docs/hicache.md runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from radixkv.pool import host

PAGE = Path(__file__).parents[2] / "docs" / "hicache.md"


def test_the_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.HostPoolConfig, "__init__", _without_headroom(host.HostPoolConfig.__init__))
    text = PAGE.read_text()
    found = re.search(r"```python\n(.*?)```\n\nIt prints\n\n(.*?)\n\n", text, re.DOTALL)
    assert found
    code, shown = found.groups()
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.splitlines() == [line[4:] for line in shown.splitlines()]


def _without_headroom(init: Any) -> Any:
    """A test machine need not have 10 GiB to spare."""

    def wrapped(self: Any, **settings: Any) -> None:
        init(self, **{"headroom_bytes": 0, **settings})

    return wrapped


def test_every_method_is_on_the_page() -> None:
    from radixkv.hicache import HiRadixCache, RadixCache

    text = PAGE.read_text()
    internal = {"view", "node_info", "children_of", "is_stored", "stored_hashes", "last_hash", "full_evictable_size",
                "swa_evictable_size", "full_protected_size", "swa_protected_size"}  # fmt: skip
    settings = {"prefetch_stop_policy", "prefetch_threshold", "load_back_threshold", "write_through_threshold",
                "write_through_threshold_storage", "enable_storage", "disable"}  # fmt: skip
    names = {name for kind in (RadixCache, HiRadixCache) for name in dir(kind) if not name.startswith("_")}
    missing = [name for name in sorted(names - internal - settings) if name not in text]
    assert not missing
