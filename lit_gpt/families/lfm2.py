"""LFM2 (Liquid AI 2025): most layers mix tokens by a gated short convolution, the others by attention with norms of
query and key."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, qwen
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Place, Said, Squeezed, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("lfm2",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"lfm2": dict(max_position_embeddings=128000, num_key_value_heads=8)}


def preset(heads: int, hidden: int, intermediate: int) -> dict[str, Any]:
    """Return the fields of config.json of a published size with 16 layers."""
    return llama.preset(
        16, heads, 8, hidden, intermediate, 65536, model_type="lfm2", max_position_embeddings=128000, norm_eps=1e-5,
        rope_theta=1e6, full_attn_idxs=[2, 5, 8, 10, 12, 14],
    )  # fmt: skip


PRESETS = {
    "LFM2-350M": preset(16, 1024, 6656),
    "LFM2-700M": preset(24, 1536, 10240),
    "LFM2-1.2B": preset(32, 2048, 12288),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    common = llama.config({"rope_theta": 1e6, "tie_word_embeddings": hf.get("tie_embedding", True)} | hf)
    return common | {
        "norm_eps": hf.get("norm_eps", 1e-5),
        "qk_norm": "head",
        "intermediate_size": intermediate_size(hf),
        "mixers": mixers(hf),
        "conv_size": hf.get("conv_L_cache", 3),
        "conv_bias": hf.get("conv_bias", False),
    }


def intermediate_size(hf: dict[str, Any]) -> int:
    """Return the MLP's size, which files give before two thirds are taken of it and it is rounded up."""
    size = hf.get("block_ff_dim") or hf["intermediate_size"]
    if not hf.get("block_auto_adjust_ff_dim", True):
        return size
    size, multiple = int(2 * size / 3), hf.get("block_multiple_of", 256)
    if (factor := hf.get("block_ffn_dim_multiplier", 1.0)) is None:
        return size
    return -(-int(factor * size) // multiple) * multiple


def mixers(hf: dict[str, Any]) -> list[str]:
    """Return each layer's token mixer, by `layer_types` or by the list of layers with attention."""
    names, layers = {"conv": "short_conv", "full_attention": "attention"}, range(hf["num_hidden_layers"])
    full = layers if hf.get("full_attn_idxs") is None else hf["full_attn_idxs"]
    kinds = hf.get("layer_types") or ["full_attention" if layer in full else "conv" for layer in layers]
    if unknown := sorted(set(kinds) - set(names)):
        raise UserError(f"config.json: layer_types {unknown} are not supported; expected {sorted(names)}")
    return [names[kind] for kind in kinds]


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    mlp, mixer, attention = layer + "feed_forward.", layer + "conv.", layer + "self_attn."
    return {
        **qwen.weights(config),
        "h.{}.norm_1": layer + "operator_norm",
        "h.{}.norm_2": layer + "ffn_norm",
        "h.{}.attn.qk_norm.q": attention + "q_layernorm",
        "h.{}.attn.qk_norm.k": attention + "k_layernorm",
        "h.{}.attn.proj": attention + "out_proj",
        "h.{}.mixer.qkv": mixer + "in_proj",
        "h.{}.mixer.conv": mixer + "conv",
        "h.{}.mixer.proj": mixer + "out_proj",
        "h.{}.mlp.gate_up": Stacked((mlp + "w1", mlp + "w3"), (config.intermediate_size,) * 2),
        "h.{}.mlp.proj": mlp + "w2",
        "ln_f": "model.embedding_norm",
    }


ARCHITECTURES = ("lfm2",)


def gguf(config: Config) -> Layout:
    if config.conv_bias:
        raise UserError("--format gguf: llama.cpp's lfm2 has convolutions without biases")
    mixer = "blk.{}.shortconv."
    places: dict[str, str | Place] = {
        "h.{}.mixer.qkv": mixer + "in_proj",
        "h.{}.mixer.conv": Squeezed((mixer + "conv",), 1),
        "h.{}.mixer.proj": mixer + "out_proj",
        "ln_f": "token_embd_norm",
    }
    return Layout("lfm2", metadata={"shortconv.l_cache": config.conv_size}, places=places, unread="")


def from_gguf(said: Said) -> dict[str, Any]:
    layers = range(said.need("block_count", int))
    kinds = ["full_attention" if said.holds(f"blk.{layer}.attn_q.weight") else "conv" for layer in layers]
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": said.need("shortconv.l_cache", int),
        "conv_bias": False,
        "layer_types": kinds,
        "norm_eps": said.need("attention.layer_norm_rms_epsilon", float),
        "tie_embedding": not said.holds("output.weight"),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Lfm2Config

    own: dict[str, Any] = dict(num_key_value_heads=2, pad_token_id=None, layer_types=["conv", "full_attention"])
    size = tiny_size(**own | fields)
    return {
        "lfm2-biased": Lfm2Config(**size, conv_bias=True, block_auto_adjust_ff_dim=False),
        "lfm2": Lfm2Config(**size, block_multiple_of=32),
    }
