"""Falcon (Almazrouei et al. 2023): 7B with one key/value head and one norm, 40B and 180B with eight and two norms; RW
with ALiBi, and attention and MLP in sequence."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families.fields import activation, rope, sizes
from lit_gpt.families.tables import Grouped, Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("falcon",)
# The published files hold the head beside the embedding that it equals, and the published number of parameters counts
# it, 7,217,189,760 for 7B: it stays apart, and trains apart.
HEAD_APART = True
# transformers puts grouped keys and values into its cache once for each head, not once for each group.
CACHES_EVERY_HEAD = True

_7B: dict[str, Any] = dict(
    model_type="falcon", vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71,
    multi_query=True, parallel_attn=True, new_decoder_architecture=False, tie_word_embeddings=False,
)  # fmt: skip
_40B: dict[str, Any] = dict(_7B, hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, num_kv_heads=8,
            new_decoder_architecture=True)  # fmt: skip
# The published files store the head beside the embedding, hence tie_word_embeddings=False.
_RW: dict[str, Any] = dict(_7B, vocab_size=50304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32,
           multi_query=False, parallel_attn=False, alibi=True, bias=True, tie_word_embeddings=True)  # fmt: skip
PRESETS = {
    "falcon-rw-1b": _RW,
    "falcon-7b": _7B,
    "falcon-7b-instruct": _7B,
    "falcon-11b": dict(_40B, hidden_size=4096, num_attention_heads=32, num_ln_in_parallel_attn=1, rope_theta=500042.0,
                       max_position_embeddings=8192),
    "falcon-40b": _40B,
    "falcon-40b-instruct": _40B,
    "falcon-180b": dict(_40B, hidden_size=14848, num_hidden_layers=80, num_attention_heads=232),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    alibi = hf.get("alibi", False)
    n_head, grouped = hf["num_attention_heads"], hf.get("new_decoder_architecture", False)
    kv_heads = hf.get("num_kv_heads") or n_head
    parallel = hf.get("parallel_attn", True) or grouped
    bias = hf.get("bias", False)
    groups = kv_heads if grouped else 1 if hf.get("multi_query", True) else n_head
    if alibi and groups != n_head:
        raise UserError("config.json: 'alibi': true is not supported with heads that share keys; expected rotary ones")
    return {
        **sizes(hf),
        "n_query_groups": groups,
        "alibi": alibi,
        "alibi_rounded": alibi,
        "unrotated_layers": list(range(hf["num_hidden_layers"])) if alibi else [],
        "parallel_residual": parallel,
        "shared_attention_norm": parallel and (hf.get("num_ln_in_parallel_attn") or (2 if grouped else 1)) == 1,
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": activation(hf.get("activation", "gelu")),
        "intermediate_size": hf.get("ffn_hidden_size") or 4 * hf["hidden_size"],
        "bias": bias,
        "qkv_bias": bias,
        "proj_bias": bias,
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        **rope(hf),
    }


def weights(config: Config) -> Table:
    layer = "transformer.h.{}."
    # with parallel_attn and two norms the files call them by what they feed, else by their order
    two = config.parallel_residual and not config.shared_attention_norm
    return {
        "wte": "transformer.word_embeddings",
        "h.{}.norm_1": layer + ("ln_attn" if two else "input_layernorm"),
        "h.{}.norm_2": layer + ("ln_mlp" if two else "post_attention_layernorm"),
        "h.{}.attn.qkv": Grouped(
            (layer + "self_attention.query_key_value",), config.n_query_groups, config.n_head // config.n_query_groups
        ),
        "h.{}.attn.proj": layer + "self_attention.dense",
        "h.{}.mlp.fc": layer + "mlp.dense_h_to_4h",
        "h.{}.mlp.proj": layer + "mlp.dense_4h_to_h",
        "ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    }


ARCHITECTURES = ("falcon",)


def gguf(config: Config) -> Layout:
    if config.alibi or config.bias or not config.parallel_residual:
        raise UserError("--format gguf: llama.cpp's falcon has neither ALiBi, biases nor attention and MLP in sequence")
    said, places = {"tensor_data_layout": "jploski"}, {"h.{}.attn.qkv": "blk.{}.attn_qkv"}
    if not config.shared_attention_norm:
        places |= {"h.{}.norm_1": "blk.{}.attn_norm_2", "h.{}.norm_2": "blk.{}.attn_norm"}
    unread = "" if config.n_query_groups == 1 and config.tie_embeddings else "takes no head apart, nor grouped queries"
    return Layout("falcon", ("gelu",), metadata=said, places=places, unread=unread)


def from_gguf(said: Said) -> dict[str, Any]:
    groups, two = (
        said.get("attention.head_count_kv", int) or said.need("attention.head_count", int),
        said.holds("blk.0.attn_norm_2.weight"),
    )
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "activation": "gelu",
        "new_decoder_architecture": groups > 1,
        "num_kv_heads": groups,
        "num_ln_in_parallel_attn": 2 if two else 1,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "layer_norm_epsilon": said.need("attention.layer_norm_epsilon", float),
        "ffn_hidden_size": said.need("feed_forward_length", int),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import FalconConfig

    size: dict[str, Any] = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4) | fields
    grouped: dict[str, Any] = dict(size, new_decoder_architecture=True, num_kv_heads=2)
    return {
        "7b": FalconConfig(**size, multi_query=True),
        "40b": FalconConfig(**grouped),
        "11b": FalconConfig(**grouped, num_ln_in_parallel_attn=1, rope_parameters={"rope_theta": 5e5}),
        "rw": FalconConfig(**size, multi_query=False, parallel_attn=False, bias=True, alibi=True),
        "multi-head": FalconConfig(**size, multi_query=False, bias=True),
        "sequential": FalconConfig(**size, parallel_attn=False, bias=True, tie_word_embeddings=False),
        "linear": FalconConfig(**size, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    }
