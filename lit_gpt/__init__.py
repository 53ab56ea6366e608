"""Lit-GPT: from a Hugging Face model to a finetuned, exportable one."""

import importlib
from typing import Any

_HOME = {"Config": "config", "GPT": "model", "Tokenizer": "tokenizer"}
__all__ = ["GPT", "Config", "Tokenizer"]


def __getattr__(name: str) -> Any:
    """`lit_gpt.GPT` and the like, imported when first asked for: scripts answer `--help` without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'lit_gpt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lit_gpt.{_HOME[name]}"), name)
