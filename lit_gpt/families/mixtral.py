"""Mixtral (Jiang et al. 2024): Llama's attention, and eight experts of which each token goes to two."""

from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, PerExpert, Place, Said, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("mixtral",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": dict(max_position_embeddings=131072, num_key_value_heads=8, rope_theta=1e6, rms_norm_eps=1e-5)
}

_8X7B: dict[str, Any] = dict(
    model_type="mixtral", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096,
    intermediate_size=14336, vocab_size=32000, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6,
    num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
_8X22B: dict[str, Any] = dict(
    _8X7B, num_hidden_layers=56, num_attention_heads=48, hidden_size=6144, intermediate_size=16384,
    max_position_embeddings=65536,
)  # fmt: skip
PRESETS = {
    "Mixtral-8x7B-v0.1": _8X7B,
    "Mixtral-8x7B-Instruct-v0.1": _8X7B,
    "Mixtral-8x22B-v0.1": _8X22B,
    "Mixtral-8x22B-Instruct-v0.1": dict(_8X22B, vocab_size=32768),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        **llama.config(hf),
        "sliding_window": hf.get("sliding_window"),
        "mlp_class": "MoE",
        "n_expert": hf.get("num_local_experts", 8),
        "n_expert_per_token": hf.get("num_experts_per_tok", 2),
    }


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.block_sparse_moe."
    return {**llama.weights(config), "h.{}.mlp.router": mlp + "gate", **experts(config, mlp, "w1", "w3", "w2")}


def experts(config: Config, mlp: str, gate: str, up: str, proj: str) -> Table:
    """Return the places of all experts, which lie apart within `mlp`, by the names of their three projections."""
    inner, each = config.intermediate_size, [f"{mlp}experts.{i}." for i in range(config.n_expert)]
    return {
        "h.{}.mlp.gate_up": PerExpert(tuple(expert + name for expert in each for name in (gate, up)), (inner, inner)),
        "h.{}.mlp.proj": PerExpert(tuple(expert + proj for expert in each), (config.n_embd,)),
    }


def shared(config: Config, module: str) -> Table:
    """Return the places of the expert that all tokens go to, and of the layers that have no experts."""
    table: dict[str, str | Place] = {}
    sizes = [("h.{}.mlp.shared.", module, config.shared_intermediate_size)]
    sizes += [(f"h.{i}.mlp.", f"model.layers.{i}.mlp.", config.dense_intermediate_size) for i in config.dense_layers]
    for ours, theirs, size in sizes:
        table[ours + "gate_up"] = Stacked((theirs + "gate_proj", theirs + "up_proj"), (size, size))
        table[ours + "proj"] = Place((theirs + "down_proj",))
    return table


def dense_layers(hf: dict[str, Any]) -> list[int]:
    """Return the layers without experts, from the fields of the Qwen families."""
    step, listed = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    return [layer for layer in range(hf["num_hidden_layers"]) if layer in listed or (layer + 1) % step]


ARCHITECTURES = ("llama",)
MARK = "expert_count"


def gguf(config: Config) -> Layout:
    return Layout("llama", interleaved=True, unread="takes no experts over")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "sliding_window": None,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import MixtralConfig

    own = dict(intermediate_size=40, num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2)
    return {"mixtral": MixtralConfig(**tiny_size(**own | fields))}
