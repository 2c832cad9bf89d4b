"""radixkv: the KV-cache layer that LLM engines and gateways link instead of writing it themselves."""

__version__ = "0.1.0"

from .paths import get_include, get_library_path

__all__ = ["__version__", "get_include", "get_library_path"]
