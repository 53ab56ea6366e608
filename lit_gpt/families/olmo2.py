"""OLMo 2 (OLMo Team 2024): norms behind attention and MLP instead of before them, and of the whole query and key; OLMo
3 (2025): a window in three layers of four, and angles stretched in the fourth."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, qwen
from lit_gpt.families.fields import tiny_size, two_ropes, windows
from lit_gpt.families.tables import Layout, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("olmo2", "olmo3")

_OWN: dict[str, Any] = dict(model_type="olmo2", vocab=100352, max_position_embeddings=4096, rope_theta=500000.0)
_YARN: dict[str, Any] = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192, beta_fast=32.0,
             beta_slow=1.0, attention_factor=1.2079441541679836)  # fmt: skip
_3: dict[str, Any] = dict(_OWN, model_type="olmo3", vocab=100278, max_position_embeddings=65536, rope_scaling=_YARN,
                          sliding_window=4096)  # fmt: skip
PRESETS = {
    "OLMo-2-0425-1B": llama.preset(16, 16, 16, 2048, 8192, **_OWN),
    "OLMo-2-1124-7B": llama.preset(32, 32, 32, 4096, 11008, **_OWN),
    "OLMo-2-1124-13B": llama.preset(40, 40, 40, 5120, 13824, **_OWN),
    "OLMo-2-0325-32B": llama.preset(64, 40, 8, 5120, 27648, **_OWN),
    "Olmo-3-1025-7B": llama.preset(32, 32, 32, 4096, 11008, **_3),
    "Olmo-3-1125-32B": llama.preset(64, 40, 8, 5120, 27648, **_3),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    own = {"qk_norm": "projection", "pre_norm": False, "post_norm": True, "norm_eps": hf.get("rms_norm_eps", 1e-5)}
    if hf["model_type"] == "olmo2":
        return llama.config(hf) | own
    kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(hf["num_hidden_layers"])]
    ropes = two_ropes(hf, base=500000.0, local_base=500000.0, older_local="rope_theta")
    return llama.config(hf) | own | windows({"sliding_window": 4096} | hf, kinds) | ropes


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    return {
        **qwen.weights(config),
        "h.{}.post_norm_1": layer + "post_attention_layernorm",
        "h.{}.post_norm_2": layer + "post_feedforward_layernorm",
    }


def gguf(config: Config) -> Layout:
    if config.local_rope_base is not None:
        raise UserError("--format gguf: exports of OLMo 3 are not made yet; export it as hf")
    return Layout("olmo2", unread="does not know the architecture")


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Olmo2Config, Olmo3Config

    size = tiny_size(**dict(num_key_value_heads=2, pad_token_id=None) | fields)
    yarn = _YARN | {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    ropes = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    kinds = ["sliding_attention", "full_attention"]
    return {
        "olmo3": Olmo3Config(**size, sliding_window=5, layer_types=kinds, rope_parameters=ropes),
        "olmo2": Olmo2Config(**size),
    }
