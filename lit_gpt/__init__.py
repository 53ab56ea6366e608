"""Lit-GPT: from a Hugging Face model to a finetuned, exportable one."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_gpt.api import LitGPT as LitGPT
    from lit_gpt.checkpoints.base_model import load_model as load_model
    from lit_gpt.families.registry import config_from_hf as config_from_hf
    from lit_gpt.families.registry import config_from_name as config_from_name
    from lit_gpt.model.config import Config as Config
    from lit_gpt.model.gpt import GPT as GPT
    from lit_gpt.text.tokenizer import Tokenizer as Tokenizer

_MODULES = {
    "Config": "model.config",
    "config_from_hf": "families.registry",
    "config_from_name": "families.registry",
    "GPT": "model.gpt",
    "LitGPT": "api",
    "Tokenizer": "text.tokenizer",
    "load_model": "checkpoints.base_model",
}
__all__ = ["GPT", "Config", "LitGPT", "Tokenizer", "config_from_hf", "config_from_name", "load_model"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import `lit_gpt.GPT` and the like when first asked for: scripts answer `--help` without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_gpt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lit_gpt.{_MODULES[name]}"), name)
