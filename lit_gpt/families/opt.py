"""OPT (Zhang et al. 2022): learned positions, of which the first has the third row, and biases everywhere."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families.fields import activation, refuse, sizes
from lit_gpt.families.tables import Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("opt",)


def _preset(layers: int, heads: int, hidden: int) -> dict[str, Any]:
    return dict(
        model_type="opt", num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden, ffn_dim=4 * hidden,
        vocab_size=50272, max_position_embeddings=2048,
    )  # fmt: skip


PRESETS = {
    "opt-125m": _preset(12, 12, 768),
    "opt-1.3b": _preset(24, 32, 2048),
    "opt-2.7b": _preset(32, 32, 2560),
    "opt-6.7b": _preset(32, 32, 4096),
    "opt-13b": _preset(40, 40, 5120),
    "opt-30b": _preset(48, 56, 7168),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, do_layer_norm_before=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True)
    if (width := hf.get("word_embed_proj_dim") or hf["hidden_size"]) != hf["hidden_size"]:
        raise UserError(f"config.json: 'word_embed_proj_dim': {width} is not supported; expected hidden_size")
    return {
        **sizes(hf),
        "learned_positions": True,
        "position_offset": 2,
        "unrotated_layers": list(range(hf["num_hidden_layers"])),
        "activation": activation(hf.get("activation_function", "relu")),
        "intermediate_size": hf["ffn_dim"],
        **dict.fromkeys(("bias", "qkv_bias", "proj_bias"), hf.get("enable_bias", True)),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def weights(config: Config) -> Table:
    layer = "model.decoder.layers.{}."
    return {
        "wte": "model.decoder.embed_tokens",
        "wpe": "model.decoder.embed_positions",
        "h.{}.norm_1": layer + "self_attn_layer_norm",
        "h.{}.norm_2": layer + "final_layer_norm",
        "h.{}.attn.qkv": Stacked(tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"), config.qkv_sizes),
        "h.{}.attn.proj": layer + "self_attn.out_proj",
        "h.{}.mlp.fc": layer + "fc1",
        "h.{}.mlp.proj": layer + "fc2",
        "ln_f": "model.decoder.final_layer_norm",
        "lm_head": "lm_head",
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import OPTConfig

    size: dict[str, Any] = dict(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=112, pad_token_id=None,
        max_position_embeddings=64, dropout=0.0,
    ) | fields  # fmt: skip
    return {"opt": OPTConfig(**size)}
