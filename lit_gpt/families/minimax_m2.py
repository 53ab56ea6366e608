"""MiniMax M2 (MiniMax 2025): experts that sigmoids score, with corrections that balance them, norms of the whole query
and key, and half of each head rotated."""

from typing import Any

from lit_gpt.families import llama, mixtral, qwen
from lit_gpt.families.fields import rope, tiny_size
from lit_gpt.families.tables import Place, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("minimax_m2",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"minimax_m2": dict(max_position_embeddings=196608, num_key_value_heads=8, head_dim=128, rope_theta=5e6)}

PRESETS = {
    "MiniMax-M2": llama.preset(
        62, 48, 8, 3072, 1536, 200064, model_type="minimax_m2", head_dim=128, max_position_embeddings=196608,
        rope_theta=5e6, rotary_dim=64, num_local_experts=256, num_experts_per_tok=8,
    ),
}  # fmt: skip


class Gate(Place):
    """A router whose correction is stored beside it, not in it."""

    def name(self, module: str, kind: str) -> str:
        return f"{module}.{kind}" if kind == "weight" else f"{module.rpartition('.')[0]}.{kind}"


def config(hf: dict[str, Any]) -> dict[str, Any]:
    common = llama.config(hf)
    size = common["head_size"] or hf["hidden_size"] // hf["num_attention_heads"]
    rotated = {"partial_rotary_factor": hf["rotary_dim"] / size} if hf.get("rotary_dim") else {}
    return common | {
        "qk_norm": "projection",
        "mlp_class": "MoE",
        "n_expert": hf.get("num_local_experts", 256),
        "n_expert_per_token": hf.get("num_experts_per_tok", 8),
        "router_score": "sigmoid",
        "router_correction": True,
        **rope(rotated | hf),
    }


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.block_sparse_moe."
    return {
        **qwen.weights(config),
        "h.{}.mlp.router": Gate((mlp + "gate",)),
        **mixtral.experts(config, mlp, "w1", "w3", "w2"),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import MiniMaxM2Config

    own: dict[str, Any] = dict(
        intermediate_size=24, num_key_value_heads=2, head_dim=24, num_local_experts=5, num_experts_per_tok=2,
        rotary_dim=12, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return {"minimax_m2": MiniMaxM2Config(**tiny_size(**own | fields))}
