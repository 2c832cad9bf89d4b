"""Tests over real sockets. Without pyzmq or msgspec every module here is skipped by these lines."""

import pytest

pytest.importorskip("zmq")
pytest.importorskip("msgspec")
