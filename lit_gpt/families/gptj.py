"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side behind one norm, and a part of each head rotated, by
neighbors."""

from typing import Any

from lit_gpt.families.fields import activation
from lit_gpt.families.tables import Table, Turned, neighbors_apart
from lit_gpt.model.config import Config

MODEL_TYPES = ("gptj",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"gptj": dict(rotary_dim=64)}
DERIVED = ("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions")

PRESETS = {
    "gpt-j-6b": dict(model_type="gptj", n_layer=28, n_head=16, n_embd=4096, rotary_dim=64, vocab_size=50400,
                     n_positions=2048),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    head_size = hf["n_embd"] // hf["n_head"]
    return {
        "n_layer": hf["n_layer"],
        "n_head": hf["n_head"],
        "n_embd": hf["n_embd"],
        "vocab_size": hf["vocab_size"],
        "block_size": hf["n_positions"],
        "rotary_percentage": (hf.get("rotary_dim") or head_size) / head_size,
        "parallel_residual": True,
        "shared_attention_norm": True,
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": activation(hf.get("activation_function", "gelu_new")),
        "intermediate_size": hf.get("n_inner") or 0,
        "bias": True,
        "head_bias": True,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }


def weights(config: Config) -> Table:
    layer, order = "transformer.h.{}.", neighbors_apart(config.rope_n_elem, config.head_size)
    return {
        "wte": "transformer.wte",
        "h.{}.norm_1": layer + "ln_1",
        "h.{}.attn.qkv": Turned(tuple(f"{layer}attn.{x}_proj" for x in "qkv"), config.qkv_sizes, order),
        "h.{}.attn.proj": layer + "attn.out_proj",
        "h.{}.mlp.fc": layer + "mlp.fc_in",
        "h.{}.mlp.proj": layer + "mlp.fc_out",
        "ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GPTJConfig

    size: dict[str, Any] = dict(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_inner=112, n_positions=64, rotary_dim=12, bos_token_id=1,
        eos_token_id=2,
    ) | fields  # fmt: skip
    return {"gptj": GPTJConfig(**size)}
