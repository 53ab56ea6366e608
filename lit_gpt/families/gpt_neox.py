"""GPT-NeoX (Black et al. 2022): Pythia, RedPajama-INCITE, StableLM-alpha, Dolly."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families.fields import activation, rope, sizes, tiny_size
from lit_gpt.families.tables import Grouped, Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("gpt_neox",)
MODULES = {"embed_out": "lm_head"}
DERIVED = ("*.attention.bias", "*.attention.masked_bias")


def _preset(layers: int, heads: int, hidden: int, vocab: int = 50304, **fields: Any) -> dict[str, Any]:
    return dict(
        model_type="gpt_neox", num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden,
        intermediate_size=4 * hidden, vocab_size=vocab, max_position_embeddings=2048, rotary_pct=0.25,
        layer_norm_eps=1e-5, use_parallel_residual=True,
    ) | fields  # fmt: skip


_RED_PAJAMA: dict[str, Any] = dict(rotary_pct=1.0, use_parallel_residual=False)
PRESETS = {
    "pythia-14m": _preset(6, 4, 128),
    "pythia-31m": _preset(6, 8, 256),
    "pythia-70m": _preset(6, 8, 512),
    "pythia-160m": _preset(12, 12, 768),
    "pythia-410m": _preset(24, 16, 1024),
    "pythia-1b": _preset(16, 8, 2048),
    "pythia-1.4b": _preset(24, 16, 2048),
    "pythia-2.8b": _preset(32, 32, 2560),
    "pythia-6.9b": _preset(32, 32, 4096, 50432),
    "pythia-12b": _preset(36, 40, 5120, 50688),
    "RedPajama-INCITE-3B": _preset(32, 32, 2560, 50432, **_RED_PAJAMA),
    "RedPajama-INCITE-7B": _preset(32, 32, 4096, 50432, **_RED_PAJAMA),
    "stablelm-alpha-3b": _preset(16, 32, 4096, 50688, max_position_embeddings=4096),
    "stablelm-alpha-7b": _preset(16, 48, 6144, 50432, max_position_embeddings=4096),
    "dolly-v2-3b": _preset(32, 32, 2560, 50280),
    "dolly-v2-7b": _preset(32, 32, 4096, 50280),
    "dolly-v2-12b": _preset(36, 40, 5120, 50280),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf.get("attention_bias", True)
    parallel = hf.get("use_parallel_residual", True)
    return {
        **sizes(hf),
        "parallel_residual": parallel,
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "activation": activation(hf.get("hidden_act", "gelu")),
        "intermediate_size": hf["intermediate_size"],
        "bias": True,
        "qkv_bias": bias,
        "proj_bias": bias,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        **rope({"rotary_pct": 0.25} | hf, base="rotary_emb_base", percentage="rotary_pct"),  # the family's default
    }


def weights(config: Config) -> Table:
    layer = "gpt_neox.layers.{}."
    return {
        "wte": "gpt_neox.embed_in",
        "h.{}.norm_1": layer + "input_layernorm",
        "h.{}.norm_2": layer + "post_attention_layernorm",
        "h.{}.attn.qkv": Grouped((layer + "attention.query_key_value",), config.n_head, 1),
        "h.{}.attn.proj": layer + "attention.dense",
        "h.{}.mlp.fc": layer + "mlp.dense_h_to_4h",
        "h.{}.mlp.proj": layer + "mlp.dense_4h_to_h",
        "ln_f": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    }


ARCHITECTURES = ("gptneox",)


def gguf(config: Config) -> Layout:
    if config.tie_embeddings or not config.qkv_bias:
        raise UserError("--format gguf: llama.cpp's gptneox has a head of its own, and biases in the attention")
    parallel = {"use_parallel_residual": config.parallel_residual}
    return Layout("gptneox", ("gelu", "gelu_tanh"), metadata=parallel, places={"h.{}.attn.qkv": "blk.{}.attn_qkv"})


def from_gguf(said: Said) -> dict[str, Any]:
    head_size = said.get("attention.key_length", int) or (
        said.need("embedding_length", int) // said.need("attention.head_count", int)
    )
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": said.get("use_parallel_residual", bool, True),
        "layer_norm_eps": said.need("attention.layer_norm_epsilon", float),
        "rotary_pct": said.need("rope.dimension_count", int) / head_size,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GPTNeoXConfig

    size = tiny_size(**dict(intermediate_size=160, max_position_embeddings=2048) | fields)
    full = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}
    return {
        "pythia": GPTNeoXConfig(**size),
        "redpajama": GPTNeoXConfig(**size, use_parallel_residual=False, rope_parameters=full),
        "no-attention-bias": GPTNeoXConfig(**size, attention_bias=False, hidden_act="gelu_fast"),
        "tied": GPTNeoXConfig(**size, tie_word_embeddings=True),
    }
