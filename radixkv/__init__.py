"""radixkv: the KV-cache layer that LLM engines and gateways link instead of writing it themselves."""

__version__ = "0.1.0"
