"""A storage plug-in as SGLang's users write them: a file a value, tensors in and out, no radixkv in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


class Plugin:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        path = self.folder / key
        if not path.exists():
            return None
        target_location.set_(torch.from_numpy(np.fromfile(path, np.uint8)).untyped_storage())
        return target_location

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        return [self.get(key, target) for key, target in zip(keys, target_locations, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        temporary = self.folder / f"~{key[:190]}"
        value.numpy().tofile(temporary)
        temporary.rename(self.folder / key)
        return True

    def batch_set(self, keys: list[str], values: Any = None, target_locations: Any = None, sizes: Any = None) -> bool:
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    def exists(self, key: str) -> bool:
        return (self.folder / key).exists()

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
