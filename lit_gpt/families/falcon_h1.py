"""Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448): attention and Mamba-2 beside each other in every layer, and fixed
factors on nearly every product."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import granite_hybrid, llama
from lit_gpt.families.fields import refuse, tiny_size
from lit_gpt.families.tables import Layout, Named, Place, Said, Scaled, Stacked, Table, chained
from lit_gpt.model.config import Config

MODEL_TYPES = ("falcon_h1",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "falcon_h1": dict(max_position_embeddings=8192, num_key_value_heads=8, rms_norm_eps=1e-5)
}

PRESETS = {
    "Falcon-H1-0.5B-Base": llama.preset(
        36, 8, 2, 1024, 2048, 32784, model_type="falcon_h1", head_dim=64, max_position_embeddings=16384,
        rms_norm_eps=1e-5, rope_theta=1e11, mamba_d_ssm=1536, mamba_n_heads=24, mamba_d_head=64, mamba_d_state=128,
        mamba_n_groups=1,
    ),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, mamba_proj_bias=False, projectors_bias=False, hidden_act="silu")
    granite_hybrid.refuse_step_limit(hf)
    normed = hf.get("mamba_rms_norm", False)
    if normed:
        refuse({"mamba_norm_before_gate": True} | hf, mamba_norm_before_gate=False)
    layers, heads, size = hf["num_hidden_layers"], hf.get("mamba_n_heads", 128), hf.get("mamba_d_head", "auto")
    values = hf.get("mamba_d_ssm", 1024) or hf.get("mamba_expand", 2) * hf["hidden_size"]
    common, groups = llama.config(hf), hf.get("mamba_n_groups", 1)
    head_size = common["head_size"] or common["n_embd"] // common["n_head"]
    return common | {
        "mixers": ["attention+mamba2"] * layers,
        "attention_scale": hf.get("key_multiplier", 1.0) * head_size**-0.5,
        "mixer_input_scales": [hf.get("attention_in_multiplier", 1.0), hf.get("ssm_in_multiplier", 1.0)],
        "mixer_output_scales": [hf.get("attention_out_multiplier", 1.0), hf.get("ssm_out_multiplier", 1.0)],
        "state_scales": hf.get("ssm_multipliers") or [1.0] * 5,
        "mlp_class": "ScaledSwiGLU",
        "mlp_scales": hf.get("mlp_multipliers") or [1.0, 1.0],
        "embedding_scale": hf.get("embedding_multiplier", 1.0),
        "logit_divisor": 1 / hf.get("lm_head_multiplier", 1.0),
        "conv_size": hf.get("mamba_d_conv", 4),
        "conv_bias": hf.get("mamba_conv_bias", True),
        "state_heads": heads,
        "state_head_size": values // heads if size == "auto" else size,
        "state_groups": groups,
        "state_norm_groups": groups if normed else 0,
        "state_size": hf.get("mamba_d_state", 256),
    }


def weights(config: Config) -> Table:
    layer, norm = "model.layers.{}.", {"h.{}.mixer.norm": "model.layers.{}.mamba.norm"}
    gate_up = tuple(f"{layer}feed_forward.{name}_proj" for name in ("gate", "up"))
    return {
        **llama.weights(config),
        "h.{}.norm_2": layer + "pre_ff_layernorm",
        "h.{}.mixer": layer + "mamba",
        "h.{}.mixer.qkv": layer + "mamba.in_proj",
        "h.{}.mixer.conv": layer + "mamba.conv1d",
        "h.{}.mixer.proj": layer + "mamba.out_proj",
        **(norm if config.state_norm_groups else {}),
        "h.{}.mlp.gate_up": Stacked(gate_up, (config.intermediate_size,) * 2),
        "h.{}.mlp.proj": layer + "feed_forward.down_proj",
        "ln_f": "model.final_layernorm",
    }


ARCHITECTURES = ("falcon-h1",)


def gguf(config: Config) -> Layout:
    if not config.conv_bias or config.tie_embeddings:
        raise UserError("--format gguf: llama.cpp's falcon-h1 has convolutions with biases, and a head of its own")
    return Layout(
        "falcon-h1",
        ("silu",),
        metadata={"attention.head_count_kv": config.n_query_groups, **granite_hybrid.mamba2_metadata(config)},
        places=folded_places(config),
        folded={
            "attention_scale": config.head_size**-0.5,
            "mixer_input_scales": [1.0, 1.0],
            "mixer_output_scales": [1.0, 1.0],
            "state_scales": [1.0] * 5,
            "mlp_scales": [1.0, 1.0],
            "embedding_scale": 1.0,
            "logit_divisor": 1.0,
        },
    )


def folded_places(config: Config) -> Table:
    """Return where tensors lie in a GGUF file, each multiplied by the factor of what it computes."""
    (attention_in, state_in), (attention_out, state_out) = config.mixer_input_scales, config.mixer_output_scales
    of_gate, of_down = config.mlp_scales
    of_keys = (config.attention_scale or 1.0) * config.head_size**0.5
    places, block = granite_hybrid.mamba2_places(config), "blk.{}."
    values, keys = config.state_heads * config.state_head_size, config.state_groups * config.state_size
    rows = (values, values, keys, keys, config.state_heads)
    halves = (config.intermediate_size,) * 2

    def by(factor: float, size: int, name: str) -> Place:
        return chained(Scaled((), (factor,), (size,)), Place((name,)))

    return {
        **places,
        "wte": by(config.embedding_scale, config.padded_vocab_size, "token_embd"),
        "h.{}.norm_2": Named((block + "ffn_norm",)),  # without the kind that all other names end with
        "lm_head": by(1 / config.logit_divisor, config.padded_vocab_size, "output"),
        "h.{}.attn.qkv": chained(
            Scaled((), (attention_in, attention_in * of_keys, attention_in), config.qkv_sizes),
            Stacked(tuple(f"{block}attn_{x}" for x in "qkv"), config.qkv_sizes),
        ),
        "h.{}.attn.proj": by(attention_out, config.n_embd, block + "attn_output"),
        "h.{}.mixer.qkv": chained(
            Scaled((), tuple(state_in * scale for scale in config.state_scales), rows), Place((block + "ssm_in",))
        ),
        "h.{}.mixer.proj": by(state_out, config.n_embd, block + "ssm_out"),
        "h.{}.mlp.gate_up": chained(
            Scaled((), (of_gate, 1.0), halves), Stacked(tuple(f"{block}ffn_{x}" for x in ("gate", "up")), halves)
        ),
        "h.{}.mlp.proj": by(of_down, config.n_embd, block + "ffn_down"),
    }


def from_gguf(said: Said) -> dict[str, Any]:
    heads, values = said.need("ssm.time_step_rank", int), said.need("ssm.inner_size", int)
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "mamba_d_ssm": values,
        "mamba_n_heads": heads,
        "mamba_d_head": values // heads,
        "mamba_d_state": said.need("ssm.state_size", int),
        "mamba_d_conv": said.need("ssm.conv_kernel", int),
        "mamba_n_groups": said.need("ssm.group_count", int),
        "mamba_conv_bias": True,
        "mamba_rms_norm": said.holds("blk.0.ssm_norm.weight"),
        "mamba_norm_before_gate": False,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import FalconH1Config

    size = tiny_size(
        num_key_value_heads=2, head_dim=16, mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=2, pad_token_id=None, embedding_multiplier=3.0, lm_head_multiplier=0.3, key_multiplier=0.6,
        attention_in_multiplier=1.2, attention_out_multiplier=0.7, ssm_in_multiplier=1.5, ssm_out_multiplier=0.4,
        mlp_multipliers=[0.8, 0.5], ssm_multipliers=[0.7, 0.9, 1.3, 0.6, 0.8], **fields,
    )  # fmt: skip
    normed = dict(mamba_rms_norm=True, mamba_norm_before_gate=False, tie_word_embeddings=True)
    return {"falcon_h1": FalconH1Config(**size), "normed": FalconH1Config(**size | normed)}
