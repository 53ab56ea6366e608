"""SmolLM3 (Bakouch et al. 2025): Llama without rotary embedding in every fourth layer."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama
from lit_gpt.families.fields import rope, tiny_size, windows
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("smollm3",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"smollm3": dict(max_position_embeddings=32768, num_key_value_heads=4)}

PRESETS = {
    "SmolLM3-3B": llama.preset(36, 16, 4, 2048, 11008, 128256, model_type="smollm3", max_position_embeddings=65536,
                               rope_theta=5e6, tie_word_embeddings=True),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    layers, interval = range(hf["num_hidden_layers"]), hf.get("no_rope_layer_interval", 4)
    # in spite of its name, the field holds 1 for each layer that rotates
    rotates = hf.get("no_rope_layers") or [(layer + 1) % interval for layer in layers]
    windowed = hf.get("use_sliding_window") and hf.get("sliding_window") is not None
    kinds = ["sliding_attention" if windowed and not rotates[layer] else "full_attention" for layer in layers]
    return llama.config(hf) | {
        "unrotated_layers": [layer for layer in layers if not rotates[layer]],
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        **windows(hf, kinds),
        **rope({"rope_theta": 2e6} | hf),  # the family's default
    }


weights = llama.weights


ARCHITECTURES = ("smollm3",)


def gguf(config: Config) -> Layout:
    if config.unrotated_layers != [layer for layer in range(config.n_layer) if (layer + 1) % 4 == 0]:
        raise UserError("--format gguf: llama.cpp's smollm3 rotates all layers but every fourth")
    return Layout("smollm3", interleaved=True)


def from_gguf(said: Said) -> dict[str, Any]:
    return {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layer_interval": 4}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import SmolLM3Config

    own: dict[str, Any] = dict(num_key_value_heads=2, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    return {"smollm3": SmolLM3Config(**tiny_size(**own | fields), no_rope_layer_interval=2)}
