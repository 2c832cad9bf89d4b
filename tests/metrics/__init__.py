"""Tests of the metrics. Without prometheus_client every module here is skipped by this line."""

import pytest

pytest.importorskip("prometheus_client")
