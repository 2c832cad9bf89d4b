"""Tests of the demo. Without torch or transformers every module here is skipped by these lines."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torch.set_num_threads(1)
