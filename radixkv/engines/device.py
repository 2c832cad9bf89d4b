"""L5: a GPU made to compute the same bits for the same shapes, so that what was cached can be compared bit by bit."""

from __future__ import annotations

import os

from ..errors import DeviceUnavailableError
from ..extras import require

__all__ = ["prepare_device"]


def prepare_device(device: str) -> None:
    """Check that torch can compute there; on a GPU, let equal shapes give equal bits from now on, in this process.

    What would break that on a GPU, and what is set against it:
        cuBLAS picks an algorithm by the workspace that is free   CUBLAS_WORKSPACE_CONFIG, before its first use
        sums by atomics, in the order in which they happen         torch.use_deterministic_algorithms
        kernels chosen by timing                                   torch.backends.cudnn.benchmark off
        TF32, which rounds where float32 does not                  off (equal anyway, but a CPU may be compared with)
        fused attention that splits the keys by how many SMs are idle   the math kernel alone

    Raises: DeviceUnavailableError.
    """
    if device == "cpu":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch = require("torch", "a model", "engines")
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise DeviceUnavailableError(f"{device!r} is neither cpu nor cuda[:N]")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise DeviceUnavailableError(f"{device}: torch {torch.__version__} sees {count} GPUs")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for fused in ("flash", "mem_efficient", "cudnn"):
        switch = getattr(torch.backends.cuda, f"enable_{fused}_sdp", None)
        if switch is not None:
            switch(False)
    torch.backends.cuda.enable_math_sdp(True)
