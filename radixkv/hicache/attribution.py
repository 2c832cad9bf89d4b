"""L5: where each request's prompt came from, told by the calls that a scheduler makes anyway.

    match_prefix                        nothing: a waiting request is matched again and again
    prefetch_from_storage(rid)          the controller keeps how much it brought
    init_load_back                      noted: so many tokens up to this node come from the host
    cache_unfinished_req, the first     len(prefix_indices) tokens were found, the rest is computed. Of those
                                        found, what was loaded up to last_node came from the host; of that, what a
                                        prefetch had brought, from storage
    cache_unfinished_req, with the      counted, once: later calls, a retraction, and what is loaded after it change
    whole prompt; cache_finished_req    nothing

A request is known by its ``rid``. One without is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from ..controller import Attribution

__all__ = ["Attributions", "Counted"]

KEPT_REQUESTS = 1 << 16
"""Requests that have begun and not finished; more than any engine runs. Beyond, the oldest are forgotten."""

KEPT_FINISHED = 4096
"""Finished requests that may be asked for."""

KEPT_LOADS = 4096
"""Loads that no request has used yet."""


class Counted(Protocol):
    """The part of a controller that counts."""

    def account(self, req_id: Any, num_tokens: int, device_tokens: int, loaded_tokens: int) -> Attribution: ...

    def forget_request(self, req_id: Any) -> None: ...


class _Account:
    """One request. split: None until it is counted. told: by the engine itself."""

    __slots__ = ("found", "loaded", "split", "told")

    def __init__(self, found: int, loaded: int) -> None:
        self.found, self.loaded = found, loaded
        self.split: Attribution | None = None
        self.told = False


class Attributions:
    """The requests of one cache. Its scheduler's thread calls it; about a microsecond a call, none of it a token's.

    Args: counted: counts what is final.
    """

    def __init__(self, counted: Counted) -> None:
        self._counted = counted
        self._running: dict[Any, _Account] = {}
        self._finished: dict[Any, Attribution] = {}
        self.loads: dict[int, tuple[int, Callable[[], Any]]] = {}
        """By the node that they end at: tokens, and the view that init_load_back returned, while somebody holds it."""

    def note_load(self, handle: int, num_tokens: int, view: Any = None) -> None:
        """So many tokens up to a node are on their way to the device. Args: view: what the request was given for it."""
        self.loads.pop(handle, None)
        self.loads[handle] = num_tokens, _nobody if view is None else weakref.ref(view)
        if len(self.loads) > KEPT_LOADS:
            del self.loads[next(iter(self.loads))]

    def _claim(self, view: Any) -> int:
        """Tokens that were loaded up to this node for this request.

        Who holds the view that its load returned has them. If nobody holds it any more (that request was matched anew,
        or has gone) the first one has them that uses them.
        """
        found = self.loads.get(view.id)
        if found is None:
            return 0
        tokens, given = found
        holder = given()
        if holder is not None and holder is not view:  # another's, who will come; equal views are of one node
            return 0
        del self.loads[view.id]
        return tokens

    def cached(self, req: Any, finished: bool) -> None:
        """A request is about to leave its prefix_indices and last_node for new ones, or for good."""
        loaded = self._claim(req.last_node) if self.loads and req.last_node is not None else 0
        rid = getattr(req, "rid", None)
        if rid is None:
            return
        account = self._running.get(rid)
        if account is None:
            prefix = getattr(req, "prefix_indices", None)
            found = 0 if prefix is None else len(prefix)
            account = self._begin(rid, _Account(found, min(loaded, found)))
        if account.split is None and (finished or len(req.fill_ids) >= len(req.origin_input_ids)):
            prompt = len(req.origin_input_ids)
            found = min(account.found, prompt)
            loaded = min(account.loaded, found)
            account.split = self._counted.account(rid, prompt, found - loaded, loaded)
        if finished:
            self._end(rid, account)

    def explicit(self, rid: Any, num_tokens: int, device_tokens: int, loaded_tokens: int) -> Attribution:
        """The engine says it itself. What has been counted for the request already stays as it is, until it has
        finished: its name is another request's then."""
        account = self._running.get(rid)
        if account is not None and account.split is not None and not account.told:
            return account.split
        account = self._begin(rid, _Account(device_tokens + loaded_tokens, loaded_tokens))
        account.split = self._counted.account(rid, num_tokens, device_tokens, loaded_tokens)
        account.told = True
        return account.split

    def of(self, rid: Any) -> Attribution | None:
        """What was counted for a request."""
        account = self._running.get(rid)
        return self._finished.get(rid) if account is None else account.split

    def reset(self) -> None:
        """The cache is dropped, and with it what runs."""
        self.loads.clear()
        self._running.clear()

    # ---- bounds ------------------------------------------------------------------------------------------------------
    def _begin(self, rid: Any, account: _Account) -> _Account:
        self._running.pop(rid, None)
        self._running[rid] = account
        if len(self._running) > KEPT_REQUESTS:
            del self._running[next(iter(self._running))]
        return account

    def _end(self, rid: Any, account: _Account) -> None:
        del self._running[rid]
        self._counted.forget_request(rid)
        assert account.split is not None
        self._finished.pop(rid, None)
        self._finished[rid] = account.split
        if len(self._finished) > KEPT_FINISHED:
            del self._finished[next(iter(self._finished))]


def _nobody() -> None:
    return None
