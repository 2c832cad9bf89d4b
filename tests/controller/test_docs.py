"""The example of docs/controller.md runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from radixkv.pool import host

PAGE = Path(__file__).parents[2] / "docs" / "controller.md"


def test_the_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = host.HostPoolConfig
    monkeypatch.setattr(host, "HostPoolConfig", lambda: config(headroom_bytes=0))  # not 10 GiB on a test machine
    found = re.search(r"```python\n(.*?)```\n\nIt prints\n\n(.*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert found
    code, shown = found.groups()
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.splitlines() == [line[4:] for line in shown.splitlines()]
