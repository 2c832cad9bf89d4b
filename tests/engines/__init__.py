"""Tests with a real model. Without torch or transformers every module here is skipped by this line."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torch.set_num_threads(1)  # the models are tiny: threads only wait for each other, most of all on a busy machine
