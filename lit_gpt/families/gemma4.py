"""The language models of Gemma 4 (Gemma Team 2026): Gemma 3's layers, with larger heads where there is no window.

Of the small ones layers have inputs of their own, and the last share the keys and values of earlier layers. Of the
others keys are also the values where there is no window; one has experts beside its MLPs.
"""

from functools import partial
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import gemma, llama
from lit_gpt.families.fields import activation, refuse, rope, tiny_size, windows
from lit_gpt.families.tables import Layout, Named, Place, Said, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("gemma4_text", "gemma4_unified_text")
WRAPPERS = ("gemma4", "gemma4_unified")  # all that are published; the latter reads images without a tower
# What transformers takes for fields that a config.json leaves out.
_SIZES: dict[str, Any] = dict(
    vocab_size=262144, hidden_size=2304, intermediate_size=9216, num_hidden_layers=30, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256,
)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_text": dict(
        _SIZES, max_position_embeddings=131072, sliding_window=512, hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
    ),
    "gemma4_unified_text": dict(_SIZES, max_position_embeddings=262144, sliding_window=1024),
}  # fmt: skip
LEFT_OUT = {"model.layers.*.self_attn.[kv]_*": "keys and values of layers that use another layer's"}

KV_HEADS = "num_key_value_heads"
ROPES: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}

_preset = partial(
    llama.preset, vocab=262144, model_type="gemma4_text", head_dim=256, global_head_dim=512, tie_word_embeddings=True,
    final_logit_softcapping=30.0, rope_parameters=ROPES,
)  # fmt: skip
_small = partial(
    _preset, sliding_window=512, max_position_embeddings=131072, hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262144,
)  # fmt: skip
_large = partial(
    _preset, sliding_window=1024, max_position_embeddings=262144, hidden_size_per_layer_input=0, attention_k_eq_v=True,
)  # fmt: skip
PRESETS = {
    "gemma-4-E2B": _small(35, 8, 1, 1536, 6144, num_kv_shared_layers=20, use_double_wide_mlp=True,
                          layer_types=7 * [*["sliding_attention"] * 4, "full_attention"]),
    "gemma-4-E4B": _small(42, 8, 2, 2560, 10240, num_kv_shared_layers=18),
    "gemma-4-26B-A4B": _large(30, 16, 8, 2816, 2112, num_global_key_value_heads=2, enable_moe_block=True,
                              num_experts=128, top_k_experts=8, moe_intermediate_size=704),
    "gemma-4-31B": _large(60, 32, 16, 5376, 21504, num_global_key_value_heads=4),
}  # fmt: skip


def kinds(hf: dict[str, Any]) -> list[str]:
    """Return which layers have a window; the last never has."""
    layers = hf["num_hidden_layers"]
    found = hf.get("layer_types") or [("full" if (i + 1) % 6 == 0 else "sliding") + "_attention" for i in range(layers)]
    return [*found[:-1], "full_attention"]


def kv_layers(kinds: list[str], sharing: int) -> list[int]:
    """Return to which layer's keys and values each attends: the last ones to those of the last before of their kind.

    Raises:
        UserError: there is none of that kind.
    """
    if not sharing:
        return []
    own = len(kinds) - sharing
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    if lacks := set(kinds[own:]) - set(last):
        raise UserError(f"config.json: 'num_kv_shared_layers': {sharing}: no layer before has {lacks.pop()} to share")
    return [*range(own), *(last[kind] for kind in kinds[own:])]


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, attention_bias=False)
    if hf.get("use_bidirectional_attention") == "all":
        raise UserError("config.json: 'use_bidirectional_attention': \"all\" is not supported; expected a causal Gemma")
    own = hf.get("hidden_size_per_layer_input") or 0
    if own:
        refuse(hf, vocab_size_per_layer_input=hf["vocab_size"])
    layers, ropes, size = kinds(hf), hf.get("rope_parameters") or ROPES, hf["intermediate_size"]
    sharing = hf.get("num_kv_shared_layers") or 0
    fields = llama.config(hf | {"rope_parameters": None}) | {
        "attention_scale": 1.0,
        "qk_norm": "head",
        "value_norm": True,
        "post_norm": True,
        "layer_scale": True,
        "layer_input_size": own,
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "logit_softcap": hf.get("final_logit_softcapping"),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "activation": activation(hf.get("hidden_activation") or "gelu_pytorch_tanh"),
        "kv_layers": kv_layers(layers, sharing),
        **windows(hf | {"layer_types": layers}, layers),
        **rotary(ropes),
        **global_sizes(hf, layers),
    }
    if sharing and hf.get("use_double_wide_mlp"):
        refuse(hf, enable_moe_block=False)
        fields |= {"dense_layers": [*range(len(layers) - sharing, len(layers))], "dense_intermediate_size": 2 * size}
    if hf.get("enable_moe_block"):
        fields |= {
            "mlp_class": "NormedMoE",
            "intermediate_size": hf["moe_intermediate_size"],
            "shared_intermediate_size": size,
            "n_expert": hf["num_experts"],
            "n_expert_per_token": hf["top_k_experts"],
            "router_norm": True,
        }
    return fields


def global_sizes(hf: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """Return the sizes of layers without the window, which files write for all of them or layer by layer.

    Raises:
        UserError: layers of one kind differ.
    """
    everywhere = [layer for layer, kind in enumerate(layers) if kind == "full_attention"]
    tied = everywhere if hf.get("attention_k_eq_v") else []
    sizes = {"head_dim": hf.get("global_head_dim", 512)}
    if tied and hf.get("num_global_key_value_heads"):
        sizes["num_key_value_heads"] = hf["num_global_key_value_heads"]
    if given := hf.get("per_layer_config"):
        each = {int(layer): own for layer, own in given.items()}
        sizes = each.get(everywhere[0], {})
        alike = sorted(each) == everywhere and all(own == sizes for own in each.values())
        if not alike or sizes.keys() - {"head_dim", KV_HEADS}:
            raise UserError("config.json: 'per_layer_config': expected the sizes of full_attention layers, all alike")
    return {
        "global_head_size": sizes.get("head_dim", 0),
        "global_query_groups": sizes.get(KV_HEADS, 0),
        "values_from_keys": tied,
    }


def rotary(ropes: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary fields of the Config.

    Raises:
        UserError: layers with the window scale theirs.
    """
    local, full = ropes["sliding_attention"], ropes["full_attention"]
    refuse({"rope_type": "default"} | local, rope_type="default")
    fields = rope({"rope_parameters": full}) | {"local_rope_base": float(local["rope_theta"])}
    if full.get("rope_type") != "proportional":
        return fields
    turning = {"partial_rotary_factor": full.get("partial_rotary_factor", 1.0)}
    return fields | {"rotary_percentage": 1.0, "rope_scaling": fields["rope_scaling"] | turning}


def weights(config: Config) -> Table:
    layer, experts = "model.layers.{}.", "model.layers.{}.experts."
    table: dict[str, str | Place] = {
        **gemma.weights(config),
        **layer_inputs(),
        "h.{}.layer_scale": Named((layer + "layer_scalar",)),
    }
    for i in range(config.n_layer):
        rows = {f"model.layers.{i}.self_attn.{x}_proj": n for x, n in zip("qkv", config.qkv_rows(i), strict=True) if n}
        table[f"h.{i}.attn.qkv"] = Stacked(tuple(rows), tuple(rows.values()))
        gate_up = tuple(f"model.layers.{i}.mlp.{name}_proj" for name in ("gate", "up"))
        size = config.shared_intermediate_size or config.mlp(i)[1]
        table[f"h.{i}.mlp.{'shared.' if config.n_expert else ''}gate_up"] = Stacked(gate_up, (size, size))
    if not config.n_expert:
        return table
    return table | {
        "h.{}.mlp.shared.proj": layer + "mlp.down_proj",
        "h.{}.mlp.shared_norm": layer + "pre_feedforward_layernorm",
        "h.{}.mlp.shared_post_norm": layer + "post_feedforward_layernorm_1",
        "h.{}.mlp.norm": layer + "pre_feedforward_layernorm_2",
        "h.{}.mlp.post_norm": layer + "post_feedforward_layernorm_2",
        "h.{}.mlp.router": layer + "router.proj",
        "h.{}.mlp.router.input_scale": Named((layer + "router.scale",)),
        "h.{}.mlp.router.expert_scales": Named((layer + "router.per_expert_scale",)),
        "h.{}.mlp.gate_up": Named((experts + "gate_up_proj",)),
        "h.{}.mlp.proj": Named((experts + "down_proj",)),
    }


def layer_inputs() -> Table:
    """Return the places of what makes layers' own inputs, and of what takes them."""
    layer = "model.layers.{}."
    return {
        "layer_inputs.wte": "model.embed_tokens_per_layer",
        "layer_inputs.proj": "model.per_layer_model_projection",
        "layer_inputs.norm": "model.per_layer_projection_norm",
        "h.{}.layer_input.gate": layer + "per_layer_input_gate",
        "h.{}.layer_input.proj": layer + "per_layer_projection",
        "h.{}.layer_input.norm": layer + "post_per_layer_input_norm",
    }


ARCHITECTURES = ("gemma4",)


def gguf(config: Config) -> Layout:
    layers, everywhere = range(config.n_layer), config.without_window
    ours, expected = config.rope_scaling, {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    if ours != expected or not config.tie_embeddings or not config.logit_softcap:
        raise UserError("--format gguf: llama.cpp's gemma4 ties its head, caps logits, and rotates a quarter of pairs")
    if config.activation != "gelu_tanh" or (config.n_expert and config.kv_layers):
        raise UserError("--format gguf: llama.cpp's gemma4 has gelu_tanh, and experts where no layers share keys")
    return Layout(
        "gemma4",
        ("gelu_tanh",),
        keeps_window=True,
        metadata={
            "feed_forward_length": [config.shared_intermediate_size or config.mlp(layer)[1] for layer in layers],
            "attention.head_count_kv": [config.at(layer).n_query_groups for layer in layers],
            "attention.key_length": everywhere.head_size,
            "attention.value_length": everywhere.head_size,
            "attention.key_length_swa": config.head_size,
            "attention.value_length_swa": config.head_size,
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": [config.window(layer) is not None for layer in layers],
            "attention.shared_kv_layers": sum(config.kv_layer(layer) != layer for layer in layers),
            "rope.dimension_count": everywhere.head_size,
            "rope.dimension_count_swa": config.head_size,
            "rope.freq_base_swa": config.local_rope_base,
            "embedding_length_per_layer_input": config.layer_input_size,
            "expert_shared_feed_forward_length": None,
            "leading_dense_block_count": None,
            "final_logit_softcapping": config.logit_softcap,
        },
        places=gguf_places(config),
    )


def gguf_places(config: Config) -> Table:
    """Return where tensors lie in a GGUF file, of those that other architectures lack or have elsewhere."""
    block = "blk.{}."
    table: dict[str, str | Place] = {
        "h.{}.layer_scale": Named((block + "layer_output_scale.weight",)),
        "h.{}.layer_input.gate": block + "inp_gate",
        "h.{}.layer_input.proj": block + "proj",
        "h.{}.layer_input.norm": block + "post_norm",
        "layer_inputs.wte": "per_layer_token_embd",
        "layer_inputs.proj": "per_layer_model_proj",
        "layer_inputs.norm": "per_layer_proj_norm",
    }
    for i in range(config.n_layer):
        rows = {f"blk.{{}}.attn_{x}": n for x, n in zip("qkv", config.qkv_rows(i), strict=True) if n}
        table[f"h.{i}.attn.qkv"] = Stacked(tuple(rows), tuple(rows.values()))
    if not config.n_expert:
        return table
    gate_up = tuple(block + name for name in ("ffn_gate", "ffn_up"))
    return table | {
        "h.{}.mlp.shared.gate_up": Stacked(gate_up, (config.shared_intermediate_size,) * 2),
        "h.{}.mlp.shared.proj": block + "ffn_down",
        "h.{}.mlp.shared_norm": block + "ffn_norm",
        "h.{}.mlp.shared_post_norm": block + "post_ffw_norm_1",
        "h.{}.mlp.norm": block + "pre_ffw_norm_2",
        "h.{}.mlp.post_norm": block + "post_ffw_norm_2",
        "h.{}.mlp.router.input_scale": Named((block + "ffn_gate_inp.scale",)),
        "h.{}.mlp.router.expert_scales": Named((block + "ffn_down_exps.scale",)),
        "h.{}.mlp.gate_up": block + "ffn_gate_up_exps",
        "h.{}.mlp.proj": block + "ffn_down_exps",
    }


def from_gguf(said: Said) -> dict[str, Any]:
    windows, widths = said.each("attention.sliding_window_pattern", bool), said.each("feed_forward_length", int)
    groups, first = said.each("attention.head_count_kv", int), windows.index(False) if False in windows else 0
    local = {"rope_type": "default", "rope_theta": said.get("rope.freq_base_swa", float, 1e4)}
    full = (said.rope_scaling or {"rope_type": "default"}) | {"rope_theta": said.get("rope.freq_base", float, 1e6)}
    experts = said.get("expert_count", int, 0)
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "sliding_window": said.need("attention.sliding_window", int),
        "head_dim": said.need("attention.key_length_swa", int),
        "global_head_dim": said.need("attention.key_length", int),
        "num_key_value_heads": groups[windows.index(True)] if True in windows else groups[0],
        "num_global_key_value_heads": groups[first],
        "attention_k_eq_v": not said.holds(f"blk.{first}.attn_v.weight"),
        "num_kv_shared_layers": said.get("attention.shared_kv_layers", int, 0),
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "hidden_size_per_layer_input": said.get("embedding_length_per_layer_input", int, 0),
        "vocab_size_per_layer_input": said.get("vocab_size", int, 262144),
        "final_logit_softcapping": said.need("final_logit_softcapping", float),
        "rope_parameters": {"sliding_attention": local, "full_attention": full},
        "enable_moe_block": experts > 0,
        "num_experts": experts or None,
        "top_k_experts": said.get("expert_used_count", int) if experts else None,
        "moe_intermediate_size": said.get("expert_feed_forward_length", int) if experts else None,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig

    common: dict[str, Any] = dict(
        head_dim=8, global_head_dim=16, num_key_value_heads=2, sliding_window=5, pad_token_id=None,
        layer_types=["sliding_attention", "full_attention"], rope_parameters=ROPES,
    )  # fmt: skip
    size = tiny_size(**common | fields)
    large: dict[str, Any] = dict(size, attention_k_eq_v=True, num_global_key_value_heads=1)
    without: dict[str, Any] = dict(hidden_size_per_layer_input=0)
    inputs: dict[str, Any] = dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=size["vocab_size"])
    sharing: dict[str, Any] = dict(num_hidden_layers=4, num_kv_shared_layers=2, use_double_wide_mlp=True,
                   layer_types=2 * size["layer_types"])  # fmt: skip
    experts: dict[str, Any] = dict(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=24)
    return {
        "large": Gemma4TextConfig(**large | without, final_logit_softcapping=3.0),
        "unified": Gemma4UnifiedTextConfig(**large),
        "experts": Gemma4TextConfig(**large | without | experts),
        "small": Gemma4TextConfig(**size | inputs | sharing),
    }
