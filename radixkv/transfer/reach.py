"""Whether a GPU reaches the memory behind a view: asked of the driver once a view, before anything is put on a stream.

Kernels and copy engine ask the same, so that a copy is taken or refused whichever of them is to run it: a kernel that
meets pageable memory takes the context with it, and the copy engine would copy it in a hidden, synchronous way.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from ..errors import InvalidArgumentError
from ..pool.layout import KVGeometry, KVView
from .plan import reach_of

__all__ = ["Reach"]

ON_HOST, ON_DEVICE = 1, 2  # cudaMemoryType; 0 is memory that the driver does not know, 3 is managed


class Reach:
    """Answers of the driver about views, for one GPU. Args: runtime: CuPy's."""

    def __init__(self, runtime: Any, device: int) -> None:
        self._runtime, self._device = runtime, device
        # By id, which is the view's as long as it is here; weak, so that no pool lives on because it was copied once.
        self._seen: WeakValueDictionary[int, KVView] = WeakValueDictionary()

    def check(self, geometry: KVGeometry, view: KVView) -> None:
        """The device can use all that lies behind a view at its own address: the first and last byte of each base, and
        the first of each page-locked chunk between them.

        Remembered for the view, not for its addresses: memory that was freed and mapped anew comes with another view.
        Raises: InvalidArgumentError; StateError if the memory is closed. With the device current.
        """
        view.hold()
        if self._seen.get(id(view)) is view:
            return
        reach = reach_of(geometry, view)
        for base in map(int, view.bases.flat):
            inside = (seam for seam in view.boundaries if base < seam < base + reach)
            for address in (base, *inside, base + reach - 1):
                self._check_address(view, address)
        self._seen[id(view)] = view

    def _check_address(self, view: KVView, address: int) -> None:
        found = self._runtime.pointerGetAttributes(address)
        if found.devicePointer != address:
            what = "has another address on the device" if found.type else "is memory that the driver does not know"
            raise InvalidArgumentError(f"{view.device} address {address:#x} {what}; page-lock host pools first")
        if view.device == "cpu":
            if found.type == ON_DEVICE:
                raise InvalidArgumentError(f"address {address:#x} is on cuda:{found.device}, and its view says cpu")
        elif found.type == ON_HOST:
            raise InvalidArgumentError(f"address {address:#x} is in host memory, and its view says {view.device}")
        elif found.device != self._device:
            raise InvalidArgumentError(f"address {address:#x} is on cuda:{found.device}, not {view.device}")
