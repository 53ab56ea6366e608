"""OLMo 3 (OLMo Team 2025): OLMo 2 with a window in three layers of four, and angles stretched in the fourth."""

from dataclasses import replace
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, olmo2
from lit_gpt.families.fields import tiny_size, two_ropes, windows
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("olmo3",)

_YARN: dict[str, Any] = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192, beta_fast=32.0,
             beta_slow=1.0, attention_factor=1.2079441541679836)  # fmt: skip
_OWN: dict[str, Any] = dict(model_type="olmo3", vocab=100278, max_position_embeddings=65536, rope_theta=500000.0,
                            rope_scaling=_YARN, sliding_window=4096)  # fmt: skip
PRESETS = {
    "Olmo-3-1025-7B": llama.preset(32, 32, 32, 4096, 11008, **_OWN),
    "Olmo-3-1125-32B": llama.preset(64, 40, 8, 5120, 27648, **_OWN),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(hf["num_hidden_layers"])]
    return olmo2.config(hf) | {
        **windows({"sliding_window": 4096} | hf, kinds),
        **two_ropes(hf, base=500000.0, local_base=500000.0, older_local="rope_theta"),
    }


weights = olmo2.weights


ARCHITECTURES = ("olmo2",)
MARK = "attention.sliding_window"


def gguf(config: Config) -> Layout:
    if config.sliding_window and config.global_layers != [i for i in range(config.n_layer) if (i + 1) % 4 == 0]:
        raise UserError("--format gguf: llama.cpp's olmo2 has a window in all layers but every fourth")
    window = {"attention.sliding_window": config.sliding_window}
    return replace(olmo2.gguf(config), keeps_window=True, metadata=window)


def from_gguf(said: Said) -> dict[str, Any]:
    layers, window = said.need("block_count", int), said.need("attention.sliding_window", int)
    kinds = ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)]
    own = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
    return own | {"sliding_window": window, "layer_types": kinds}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Olmo3Config

    yarn = _YARN | {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    own: dict[str, Any] = dict(
        num_key_value_heads=2, pad_token_id=None, eos_token_id=2, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    )  # fmt: skip
    return {"olmo3": Olmo3Config(**tiny_size(**own | fields))}
