"""L6: one process of the demo: ``python -m radixkv.demo.process``. Reads a plan from standard input, writes one JSON
object a line to standard output: each request as it is served and judged, the controls, and at the end the counters.

    before   users take turns; then all that was computed is in storage
    after    a new process, with nothing but the folder: the users go on; then the faults that must be noticed
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.models import ChatModel, load_model
from ..errors import RadixKVError
from ..extras import require
from .chats import Conversation, conversations, question
from .config import DemoConfig
from .server import ChatServer, Served
from .verify import (
    Reference,
    Verdict,
    exchange_host_pages,
    flip_host_page,
    host_page_sample,
    host_pages_of,
)

__all__ = ["Phase", "main"]

LAST_QUESTION = "Are you sure?"
ANSWER_OVERHEAD = 8
"""Tokens, at most, that a chat template puts around an answer."""


class Phase:
    """One process's part.

    Args:
        plan: {"config": fields of DemoConfig, "folder", "name": "before" | "after", "first_turn", "turns",
            "history": {user: messages}}.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.config = DemoConfig(**plan["config"])
        self.name: str = plan["name"]
        self.turns = range(plan["first_turn"], plan["first_turn"] + plan["turns"])
        self.chats = conversations(plan["history"])
        torch = require("torch", "the demo", "engines")
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        begin = time.perf_counter()
        self.model = load_model(self.config.model, self.config.device)
        longest = longest_conversation(self.model, self.config, self.chats)
        self.config = self.config.sized(longest)
        self.server = ChatServer(self.model, self.config, Path(plan["folder"]))
        self.reference = Reference(self.server.runner, self.model.text_tokens)
        say("ready", name=self.name, pid=os.getpid(), model=self.model.name, seconds=time.perf_counter() - begin,
            token_bytes=self.server.pool.geometry.token_bytes, threads=torch.get_num_threads(),
            device=self.server.device_name, pinned=self.server.cache.token_to_kv_pool_host.pinned,
            device_tokens=self.config.device_tokens, host_tokens=self.config.host_tokens,
            longest_tokens=longest)  # fmt: skip

    def run(self) -> None:
        """Serve every turn, then what the phase is about."""
        self._warm_up()
        for turn in self.turns:
            for chat in self.chats:
                chat.ask(question(chat.user, turn, self.config.seed))
                served = self._serve(chat, turn)
                chat.answer(self.model.decode(served.answer))
        self.server.settle()
        self.server.check_integrity()
        core = self.server.cache.cache_controller.core
        say("counters", controller=core.stats()._asdict(), storage=asdict(core.storage.counters),
            operations=_operations(self.server))  # fmt: skip
        if self.name == "before":
            self._show_a_page()
        else:
            self._controls()
        say("end", history={chat.user: chat.messages for chat in self.chats})
        self.server.close()

    def _warm_up(self) -> None:
        """The first pass of a model is slow, and would be charged to whoever comes first."""
        pool = self.server.runner.new_pool(self.config.chunk_tokens)
        slots = np.arange(self.config.page_size, self.config.page_size + self.config.chunk_tokens)
        torch = require("torch", "the demo", "engines")
        for _ in range(3):
            self.server.runner.forward(pool, torch.from_numpy(slots).to(pool.device),
                                       np.zeros(self.config.chunk_tokens, np.int32), 0)  # fmt: skip

    def _serve(self, chat: Conversation, turn: int) -> Served:
        prompt = self.model.encode(chat.messages, True)
        served = self.server.serve(f"{chat.user}-{turn}", prompt, self.config.answer_tokens)
        verdict = self.reference.judge(served)
        say("request", user=chat.user, turn=turn, **_figures(served), **verdict.as_dict())
        return served

    # ---- for the parent: which bytes of which file to spoil ----------------------------------------------------------
    def _show_a_page(self) -> None:
        """Bytes of a page of the last user's own turns, which is on the host and in storage; none, if the host had no
        room for them."""
        chat = self.chats[-1]
        tokens = self.model.encode(chat.messages, False)
        tree = self.server.cache.tree
        info = [tree.node_info(node) for node in tree.path(tree.peek(tokens).host_node)]
        parts = [node.host_page_ids for node in info if node.host_page_ids is not None]
        if not parts:
            say("page", user=chat.user, page=None, sample="")
            return
        pages = np.concatenate(parts)
        own = len(self.model.encode(chat.messages[:1], False)) // self.config.page_size + 2
        page = min(own, len(pages) - 1)
        host = self.server.cache.token_to_kv_pool_host
        say("page", user=chat.user, page=page, sample=host_page_sample(host, int(pages[page])).hex())

    # ---- faults that must be noticed ---------------------------------------------------------------------------------
    def _controls(self) -> None:
        """Spoil the host tier, serve, and see the check fail. Storage is detached first, so that nothing that is
        computed from wrong KV can reach it, and the cache is reset after each. Without two pages of one prefix on the
        host there is nothing to spoil, and none of it is said."""
        self.server.cache.detach_storage_backend()
        chat = self.chats[0]
        prompt = self.model.encode([*chat.messages, {"role": "user", "content": LAST_QUESTION}], True)
        self._to_host(prompt)
        if len(host_pages_of(self.server.cache.tree, prompt)[1]) < 2:
            return
        self._judge_control("control", "nothing spoiled", prompt)
        self._to_host(prompt)
        _, pages = host_pages_of(self.server.cache.tree, prompt)
        host = self.server.cache.token_to_kv_pool_host
        middle = (len(pages) - 1) // 2
        flip_host_page(host, int(pages[middle]))
        self._judge_control("flipped", f"one bit of every 64th byte of host page {middle} of the prefix", prompt)
        self._start_anew(prompt)
        _, pages = host_pages_of(self.server.cache.tree, prompt)
        exchange_host_pages(host, int(pages[middle]), int(pages[middle + 1]))
        self._judge_control("exchanged", f"host pages {middle} and {middle + 1} of the prefix", prompt)
        self._start_anew(prompt)

    def _judge_control(self, kind: str, what: str, prompt: Any) -> Verdict:
        served = self.server.serve(f"control-{kind}", prompt, self.config.answer_tokens)
        verdict = self.reference.judge(served)
        say("control", control=kind, what=what, **_figures(served), **verdict.as_dict())
        return verdict

    def _to_host(self, prompt: Any) -> None:
        """Serve once, and let its KV leave the device."""
        self.server.serve("control-before", prompt, 1)
        self.server.settle()
        self.server.cache.evict(self.config.device_tokens)

    def _start_anew(self, prompt: Any) -> None:
        self.server.cache.reset()
        self.server.allocator.clear()
        self.server.rows.clear()
        self._to_host(prompt)


def longest_conversation(model: ChatModel, config: DemoConfig, chats: list[Conversation]) -> int:
    """Tokens of the longest conversation when all turns have been taken; of answers, that they may have."""
    turns = range(config.turns_before + config.turns_after)
    longest = 0
    for chat in chats:
        said = [
            chat.messages[0],
            *({"role": "user", "content": question(chat.user, turn, config.seed)} for turn in turns),
        ]
        tokens = model.encode([*said, {"role": "user", "content": LAST_QUESTION}], True)
        longest = max(longest, len(tokens))
    return longest + (len(turns) + 1) * (config.answer_tokens + ANSWER_OVERHEAD)


def say(kind: str, **fields: Any) -> None:
    """One line for the parent."""
    print(json.dumps({"kind": kind} | fields), flush=True)


def _figures(served: Served) -> dict[str, Any]:
    return {
        "prompt_tokens": served.prompt_tokens,
        "answer_tokens": len(served.answer),
        "tokens": served.attribution._asdict(),
        "cached_first_token_s": served.first_token_s,
    }


def _operations(server: ChatServer) -> dict[str, int]:
    return {f"{kind} {outcome}": count for (kind, outcome), count in sorted(server.listener.outcomes.items())}


def main() -> int:
    """Run the phase that standard input describes. What is missing or does not fit is said in one line."""
    try:
        Phase(json.load(sys.stdin)).run()
    except RadixKVError as error:
        say("error", message=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
