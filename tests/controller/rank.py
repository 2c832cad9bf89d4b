"""One rank of the tests with torch.distributed: python -m tests.controller.rank JSON. Prints one line of JSON.

Scenarios, each with a group of its own. "soak": random runs, in which every rank compares its tree with the others';
"parted": the last rank makes another call; "hang": it stops taking part, until the others have noticed; "exit": it dies
without a word.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from radixkv.controller import TorchGroup
from radixkv.errors import GroupError
from radixkv.storage.file import FileStorage

from .kit import ROOT, Stack, prompt
from .soak import Soak


def noticed(call: Any) -> dict[str, Any]:
    """How a rank learns that another one is gone."""
    began_s = time.monotonic()
    try:
        while True:
            call()
    except GroupError as error:
        return {"error": str(error), "seconds": time.monotonic() - began_s}


def lose_a_rank(scenario: str, folder: Path, group: TorchGroup) -> dict[str, Any]:
    """The last rank goes; the others must be told within the deadline, and can still close."""
    stack = Stack(group=group, storage=True)
    stack.compute(prompt(1, 3))
    stack.settle()
    stack.controller.prefetch("r", prompt(2, 3), ROOT)
    last = group.rank == group.size - 1
    if last and scenario == "exit":
        os._exit(0)
    if last and scenario == "hang":
        while len(list(folder.glob("noticed*"))) < group.size - 1:
            time.sleep(0.01)
        return {}
    parted = last and scenario == "parted"
    result = noticed((lambda: stack.controller.finish_prefetch("r")) if parted else stack.controller.poll)
    began_s = time.monotonic()
    for call in (stack.controller.poll, stack.controller.reset):
        try:
            call()
        except GroupError:
            continue
        raise AssertionError("a broken group was used")
    stack.close()
    if scenario == "hang":
        (folder / f"noticed{group.rank}").touch()
    return result | {"after_s": time.monotonic() - began_s}


def soak(job: dict[str, Any], group: TorchGroup) -> dict[str, Any]:
    """Random runs; of odd seeds all ranks share one storage, as for MLA."""
    served = 0
    for seed in job["seeds"]:
        shared = bool(seed % 2)
        folder = Path(job["folder"]) / (f"{seed}" if shared else f"{seed}-{group.rank}")
        storage = FileStorage(folder)
        run = Soak(seed, group=group, shared=shared, storage=storage)
        run.run(job["steps"])
        served += run.served_pages
        storage.close()
    return {"served_pages": served}


def main() -> None:
    import torch.distributed as dist

    job = json.loads(sys.argv[1])
    store = dist.FileStore(job["store"], job["size"])
    dist.init_process_group(
        "gloo", store=store, rank=job["rank"], world_size=job["size"], timeout=timedelta(seconds=120)
    )
    results: dict[str, Any] = {}
    for scenario in job["scenarios"]:
        group = TorchGroup(dist.new_group(), job["timeout_s"] if scenario == "soak" else 1.0)
        if scenario == "soak":
            results[scenario] = soak(job, group)
        else:
            results[scenario] = lose_a_rank(scenario, Path(job["folder"]), group)
    print(json.dumps(results), flush=True)
    os._exit(0)  # gloo may wait for a peer that is gone


if __name__ == "__main__":
    main()
