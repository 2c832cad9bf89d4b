"""L6: the conversations of the demo: some users of one assistant, who take turns."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["SYSTEM_PROMPT", "Conversation", "conversations", "question"]

SYSTEM_PROMPT = (
    "You are the assistant of a public library with eleven reading rooms. Answer in one or two short sentences, in the "
    "language of the question. The main hall is open from eight to twenty-two, the map room from ten to eighteen, the "
    "music room from noon to midnight. Readers may borrow six books for four weeks; maps and scores stay in the house. "
    "If the library does not have a thing, name the nearest house that has it, and offer to order it: that takes three "
    "days from the depot and two weeks from abroad. Never give out what another reader has borrowed. If you do not "
    "know, say so and point to the desk."
)

_SUBJECTS = (
    "the history of the railway to the coast", "a score of the second string quartet", "maps of the old harbour",
    "how glaciers move", "the letters of a lighthouse keeper", "growing tomatoes on a balcony", "Byzantine coins",
    "the grammar of Welsh", "repairing a bicycle", "the law of fishing rights", "photographs of the flood",
    "stories for a child of six who likes owls", "the tides of the estuary", "weaving on a small loom",
)  # fmt: skip
_WISHES = (
    "I am looking for {0}; where would I find that, and can I take it home over the weekend?",
    "My sister told me that you have something about {0}. Is there a place to sit nearby where one may talk?",
    "Last time you mentioned {0}. Could you order another volume for me, and how long would I have to wait for it?",
    "Before I come all the way: is the room with {0} open late this evening, and is there still something on {1}?",
    "Thank you. One more thing, then: would {0} be next to {1}, or do I have to go upstairs for it?",
)


@dataclass(slots=True)
class Conversation:
    """One user's messages so far, and the answers."""

    user: str
    messages: list[dict[str, str]] = field(default_factory=lambda: [{"role": "system", "content": SYSTEM_PROMPT}])

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})


def question(user: str, turn: int, seed: int, wishes: Sequence[str] = _WISHES) -> str:
    """What a user says in a turn: the same each time, and different for each user."""
    rng = random.Random(f"{seed}/{user}/{turn}")
    first, second = rng.sample(_SUBJECTS, 2)
    return wishes[min(turn, len(wishes) - 1)].format(first, second)


def conversations(history: Mapping[str, list[dict[str, str]]]) -> list[Conversation]:
    """Conversations that go on, by user; that of a user with no messages begins."""
    return [Conversation(user, list(messages)) if messages else Conversation(user)
            for user, messages in history.items()]  # fmt: skip
