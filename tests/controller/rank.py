"""One rank of the tests with torch.distributed: python -m tests.controller.rank JSON. Prints one line of JSON.

scenario "soak": the random run, then every rank compares its tree with the others'; "exit": then the last rank dies
without a word; "hang": it stops taking part, but lives until the others have noticed; "parted": it makes another call.
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


def lose_a_rank(job: dict[str, Any], group: TorchGroup) -> dict[str, Any]:
    """The last rank goes; the others must be told within the deadline, and can still close."""
    stack = Stack(group=group, storage=True)
    stack.compute(prompt(1, 3))
    stack.settle()
    stack.controller.prefetch("r", prompt(2, 3), ROOT)
    last = group.rank == group.size - 1
    flag = Path(job["folder"]) / "noticed"
    if last and job["scenario"] == "exit":
        os._exit(0)
    if last and job["scenario"] == "hang":
        while len(list(flag.parent.glob("noticed*"))) < group.size - 1:
            time.sleep(0.01)
        os._exit(0)
    if last and job["scenario"] == "parted":
        result = noticed(lambda: stack.controller.finish_prefetch("r"))
    else:
        result = noticed(stack.controller.poll)
    began_s = time.monotonic()
    for call in (stack.controller.poll, stack.controller.reset):
        try:
            call()
        except GroupError:
            continue
        raise AssertionError("a broken group was used")
    stack.close()
    (flag.parent / f"noticed{group.rank}").touch()
    return result | {"after_s": time.monotonic() - began_s}


def main() -> None:
    import torch.distributed as dist

    job = json.loads(sys.argv[1])
    store = dist.FileStore(job["store"], job["size"])
    dist.init_process_group(
        "gloo", store=store, rank=job["rank"], world_size=job["size"], timeout=timedelta(seconds=60)
    )
    group = TorchGroup(timeout_s=job["timeout_s"])
    result: dict[str, Any] = {}
    if job["scenario"] == "soak":
        served = 0
        for seed in job["seeds"]:
            shared = bool(seed % 2)
            folder = Path(job["folder"]) / (f"{seed}" if shared else f"{seed}-{group.rank}")
            storage = FileStorage(folder)
            soak = Soak(seed, group=group, shared=shared, storage=storage)
            soak.run(job["steps"])
            served += soak.served_pages
            storage.close()
        result = {"served_pages": served}
        dist.barrier()
    else:
        result = lose_a_rank(job, group)
    print(json.dumps(result), flush=True)
    os._exit(0)  # gloo may wait for a peer that is gone


if __name__ == "__main__":
    main()
