"""StableLM 2 and 3B (Bellagente et al. 2024): Llama with LayerNorm and a quarter of each head rotated; the 12B with
attention and MLP side by side, and norms of each head's query and key."""

from functools import partial
from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import rope, tiny_size
from lit_gpt.families.tables import Layout, PerHead, Said, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("stablelm",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"stablelm": dict(max_position_embeddings=4096, num_key_value_heads=32)}


_preset = partial(
    llama.preset, model_type="stablelm", vocab=100352, max_position_embeddings=4096, layer_norm_eps=1e-5,
    partial_rotary_factor=0.25,
)  # fmt: skip
PRESETS = {
    "stablelm-3b-4e1t": _preset(32, 32, 32, 2560, 6912, vocab=50304),
    "stablelm-2-1_6b": _preset(24, 32, 32, 2048, 5632, use_qkv_bias=True),
    "stablelm-2-12b": _preset(40, 32, 8, 5120, 13824, qk_layernorm=True, use_parallel_residual=True),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    parallel = hf.get("use_parallel_residual", False)
    return llama.config(hf) | {
        "qkv_bias": hf.get("use_qkv_bias", False),
        "qk_norm": "heads" if hf.get("qk_layernorm") else None,
        "parallel_residual": parallel,
        "shared_attention_norm": parallel,
        "norm_class": "LayerNorm",
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        **rope({"partial_rotary_factor": 0.25} | hf),  # the family's default
    }


def weights(config: Config) -> Table:
    def norms(name: str, heads: int) -> Stacked:
        modules = tuple(f"model.layers.{{}}.self_attn.{name}.norms.{i}" for i in range(heads))
        return Stacked(modules, (config.head_size,) * heads)

    return {
        **llama.weights(config),
        "h.{}.attn.qk_norm.q": norms("q_layernorm", config.n_head),
        "h.{}.attn.qk_norm.k": norms("k_layernorm", config.n_query_groups),
    }


ARCHITECTURES = ("stablelm",)


def gguf(config: Config) -> Layout:
    parallel = {"use_parallel_residual": config.parallel_residual}
    norms = {f"h.{{}}.attn.qk_norm.{x}": PerHead((f"blk.{{}}.attn_{x}_norm",), config.head_size) for x in "qk"}
    return Layout("stablelm", metadata=parallel, places=norms, unread="takes over neither the rotated part nor norms")


def from_gguf(said: Said) -> dict[str, Any]:
    head_size = said.need("embedding_length", int) // said.need("attention.head_count", int)
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "layer_norm_eps": said.need("attention.layer_norm_epsilon", float),
        "attention_bias": False,
        "use_parallel_residual": not said.holds("blk.0.ffn_norm.weight"),
        "use_qkv_bias": said.holds("blk.0.attn_q.bias"),
        "qk_layernorm": said.holds("blk.0.attn_q_norm.weight"),
        "partial_rotary_factor": said.get("rope.dimension_count", int, head_size) / head_size,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import StableLmConfig

    size = tiny_size(**fields)
    return {
        "1_6b": StableLmConfig(**size, num_key_value_heads=4, use_qkv_bias=True),
        "12b": StableLmConfig(**size, num_key_value_heads=2, qk_layernorm=True, use_parallel_residual=True),
    }
