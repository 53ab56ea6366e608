"""Nemotron-H and Nemotron 3 Nano (NVIDIA 2025): Mamba-2, a few layers of attention without positions, and MLPs of
squared ReLU or experts of such. What the files have as a layer each is a block here: a token mixer, and the MLP after
it, if there is one."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import granite_hybrid, llama
from lit_gpt.families.fields import activation, refuse, sigmoid_router, tiny_size
from lit_gpt.families.tables import Layout, Named, PerExpert, Place, Said, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("nemotron_h",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "nemotron_h": dict(
        vocab_size=131072, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=21504,
        max_position_embeddings=4096, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    ),
}  # fmt: skip

_30B: dict[str, Any] = dict(
    model_type="nemotron_h", vocab_size=131072, hidden_size=2688, intermediate_size=1856, num_attention_heads=32,
    num_key_value_heads=2, head_dim=128, max_position_embeddings=262144, mamba_num_heads=64, mamba_head_dim=64,
    n_groups=8, ssm_state_size=128, n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712, routed_scaling_factor=2.5,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
)  # fmt: skip
PRESETS = {"NVIDIA-Nemotron-3-Nano-30B-A3B": _30B}

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
MIXERS = {"linear_attention": "mamba2", "full_attention": "attention"}


def blocks(hf: dict[str, Any]) -> list[list[str]]:
    """Return the kinds of stored layers that each block has, a token mixer and perhaps an MLP.

    Raises:
        UserError: a layer is of another kind, or an MLP does not follow a token mixer.
    """
    stored = hf.get("layer_types") or hf["layers_block_type"]
    if pattern := hf.get("hybrid_override_pattern"):
        stored = [KINDS.get(letter, letter) for letter in pattern]
    found: list[list[str]] = []
    for kind in (OLDER.get(kind, kind) for kind in stored):
        if kind in MIXERS:
            found.append([kind])
        elif kind in ("mlp", "moe") and found and len(found[-1]) == 1:
            found[-1].append(kind)
        else:
            raise UserError(f"config.json: layers_block_type {stored}: '{kind}' is not supported in its place")
    return found


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, use_bias=False, mlp_bias=False, attention_bias=False, mamba_hidden_act="silu", moe_latent_size=None)
    kinds = blocks(hf)
    alone = [i for i, kind in enumerate(kinds) if len(kind) == 1]
    dense = [i for i, kind in enumerate(kinds) if kind[-1] == "mlp"]
    common = llama.config(hf | {"num_hidden_layers": len(kinds)})
    if len(alone) + len(dense) < len(kinds):
        common |= experts(hf) | {"dense_layers": dense}
    else:
        common["mlp_class"] = "GptNeoxMLP"
    return common | {
        "head_size": hf.get("head_dim", 128),
        "mixers": [MIXERS[kind[0]] for kind in kinds],
        "mixer_layers": alone,
        "unrotated_layers": list(range(len(kinds))),
        "activation": activation(hf.get("mlp_hidden_act", "relu2")),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "conv_size": hf.get("conv_kernel", 4),
        "conv_bias": hf.get("use_conv_bias", True),
        "state_heads": hf.get("mamba_num_heads", 128),
        "state_head_size": hf.get("mamba_head_dim", 64),
        "state_groups": hf.get("n_groups", 8),
        "state_norm_groups": hf.get("n_groups", 8),
        "state_size": hf.get("ssm_state_size", 128),
        "min_step": hf.get("time_step_min", 0.001),
    }


def experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the Config for experts."""
    return {
        "mlp_class": "MoE",
        "expert_gate": False,
        "intermediate_size": hf.get("moe_intermediate_size", 7688),
        "dense_intermediate_size": hf["intermediate_size"],
        "shared_intermediate_size": hf.get("moe_shared_expert_intermediate_size", 7688),
        "n_expert": hf.get("n_routed_experts", 8),
        "n_expert_per_token": hf.get("num_experts_per_tok", 2),
        **sigmoid_router(hf),
    }


def weights(config: Config) -> Table:
    table: dict[str, str | Place] = {
        "wte": "backbone.embeddings", "ln_f": "backbone.norm_f", "lm_head": "lm_head",
    }  # fmt: skip
    stored = 0
    for block in range(config.n_layer):
        ours, layer = f"h.{block}.", f"backbone.layers.{stored}."
        table[ours + "norm_1"] = layer + "norm"
        table |= {ours + name: place for name, place in mixer_weights(config, block, layer + "mixer").items()}
        stored += 1
        if block not in config.mixer_layers:
            layer = f"backbone.layers.{stored}."
            table[ours + "norm_2"] = layer + "norm"
            table |= {ours + name: place for name, place in mlp_weights(config, block, layer + "mixer.").items()}
            stored += 1
    return table


def mixer_weights(config: Config, block: int, mixer: str) -> dict[str, str | Place]:
    if config.mixer(block) == "attention":
        projections = tuple(f"{mixer}.{x}_proj" for x in "qkv")
        return {"attn.qkv": Stacked(projections, config.qkv_sizes), "attn.proj": mixer + ".o_proj"}
    return {
        "mixer": mixer,
        "mixer.qkv": mixer + ".in_proj",
        "mixer.conv": mixer + ".conv1d",
        "mixer.norm": mixer + ".norm",
        "mixer.proj": mixer + ".out_proj",
    }


def mlp_weights(config: Config, block: int, mlp: str) -> dict[str, str | Place]:
    if config.mlp(block)[0] != "MoE":
        return {"mlp.fc": mlp + "up_proj", "mlp.proj": mlp + "down_proj"}
    each = [f"{mlp}experts.{i}." for i in range(config.n_expert)]
    return {
        "mlp.router": mlp + "gate",
        "mlp.fc": PerExpert(tuple(expert + "up_proj" for expert in each), (config.intermediate_size,)),
        "mlp.proj": PerExpert(tuple(expert + "down_proj" for expert in each), (config.n_embd,)),
        "mlp.shared.fc": mlp + "shared_experts.up_proj",
        "mlp.shared.proj": mlp + "shared_experts.down_proj",
    }


ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")


def gguf(config: Config) -> Layout:
    if not config.conv_bias or config.min_step != 0.001:  # which llama.cpp passes over, as softplus is hardly less
        raise UserError("--format gguf: llama.cpp's nemotron_h has convolutions with biases, and steps of any length")
    if config.n_expert and (config.dense_layers or config.n_expert_group > 1):
        raise UserError("--format gguf: llama.cpp's nemotron_h_moe has no other MLPs, and no groups of experts")
    layers = stored_layers(config)
    widths = [config.mlp(block)[1] if kind == "mlp" else 0 for block, kind in layers]
    heads = [config.n_query_groups if kind == "attention" else 0 for _, kind in layers]
    own = {
        "block_count": len(layers),
        "feed_forward_length": widths,
        "attention.head_count_kv": heads,
        "attention.layer_norm_epsilon": config.norm_eps,  # read, though norms take the other
        **granite_hybrid.mamba2_metadata(config),
    }
    routing = {
        "expert_shared_count": 1,
        "expert_weights_norm": config.norm_expert_weights,
        "expert_weights_scale": config.expert_scale,
        "expert_gating_func": 2,  # sigmoid
        "expert_group_count": 1,
        "expert_group_used_count": 1,
    }
    return Layout(
        "nemotron_h_moe" if config.n_expert else "nemotron_h",
        ("relu2",),
        metadata=own | (routing if config.n_expert else {}),
        places=gguf_places(config),
    )


def stored_layers(config: Config) -> list[tuple[int, str]]:
    """Return the block of each layer of a file, and what the layer is of it: a token mixer, by its name, or "mlp"."""
    mixers = [(block, config.mixer(block)) for block in range(config.n_layer)]
    mlps = [(block, "mlp") for block in range(config.n_layer) if block not in config.mixer_layers]
    return sorted(mixers + mlps, key=lambda layer: (layer[0], layer[1] == "mlp"))


def gguf_places(config: Config) -> Table:
    table: dict[str, str | Place] = {}
    for stored, (block, kind) in enumerate(stored_layers(config)):
        ours, theirs = f"h.{block}.", f"blk.{stored}."
        table[ours + ("norm_2" if kind == "mlp" else "norm_1")] = theirs + "attn_norm"
        if kind == "mlp":
            experts = "_exps" if config.n_expert else ""
            table |= {
                ours + "mlp.fc": f"{theirs}ffn_up{experts}",
                ours + "mlp.proj": f"{theirs}ffn_down{experts}",
                ours + "mlp.router": theirs + "ffn_gate_inp",
                ours + "mlp.router.e_score_correction_bias": Named((theirs + "exp_probs_b.bias",)),
                ours + "mlp.shared.fc": theirs + "ffn_up_shexp",
                ours + "mlp.shared.proj": theirs + "ffn_down_shexp",
            }
        elif kind == "attention":
            projections = tuple(f"{theirs}attn_{x}" for x in "qkv")
            table[ours + "attn.qkv"] = Stacked(projections, config.qkv_sizes)
            table[ours + "attn.proj"] = theirs + "attn_output"
        else:
            table |= granite_hybrid.mamba2_places(config, ours, theirs)
    return table


def from_gguf(said: Said) -> dict[str, Any]:
    widths, groups = said.each("feed_forward_length", int), said.each("attention.head_count_kv", int)
    mlp = "moe" if said.get("expert_count", int, 0) else "mlp"
    kinds = [
        mlp if width else "full_attention" if heads else "linear_attention"
        for width, heads in zip(widths, groups, strict=True)
    ]
    heads = said.need("ssm.time_step_rank", int)
    own = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "layers_block_type": kinds,
        "intermediate_size": max(widths),
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": said.need("attention.layer_norm_rms_epsilon", float),
        "mamba_num_heads": heads,
        "mamba_head_dim": said.need("ssm.inner_size", int) // heads,
        "n_groups": said.need("ssm.group_count", int),
        "ssm_state_size": said.need("ssm.state_size", int),
        "conv_kernel": said.need("ssm.conv_kernel", int),
        "use_conv_bias": True,
    }
    return own | (routing_of(said) if mlp == "moe" else {})


def routing_of(said: Said) -> dict[str, Any]:
    """Return the fields of config.json for experts."""
    return {
        "n_routed_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "moe_intermediate_size": said.need("expert_feed_forward_length", int),
        "moe_shared_expert_intermediate_size": said.need("expert_shared_feed_forward_length", int),
        "norm_topk_prob": said.get("expert_weights_norm", bool, True),
        "routed_scaling_factor": said.get("expert_weights_scale", float, 1.0),
        "n_group": 1,
        "topk_group": 1,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import NemotronHConfig

    size = tiny_size(
        num_key_value_heads=2, head_dim=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=8,
        layers_block_type=["linear_attention", "mlp", "full_attention"], pad_token_id=None, **fields,
    )  # fmt: skip
    del size["num_hidden_layers"]  # which the list of layers says
    routed: dict[str, Any] = dict(
        n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=32,
        routed_scaling_factor=1.5, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    )  # fmt: skip
    return {"nemotron_h": NemotronHConfig(**size), "experts": NemotronHConfig(**size | routed)}
