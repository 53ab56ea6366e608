"""The language models of Gemma 3n (Gemma Team 2025): four streams, layers with inputs of their own, the last of which
share the keys and values of earlier ones, and first layers that keep the largest of their activations."""

from functools import partial
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import gemma, gemma4, llama
from lit_gpt.families.fields import activation, refuse, tiny_size, two_ropes, windows
from lit_gpt.families.tables import Named, Place, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("gemma3n_text",)
WRAPPERS = ("gemma3n",)  # all that are published
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3n_text": dict(
        vocab_size=262400, hidden_size=2048, intermediate_size=16384, num_hidden_layers=35, num_attention_heads=8,
        num_key_value_heads=2, head_dim=256, max_position_embeddings=32768, sliding_window=512,
        final_logit_softcapping=30.0, vocab_size_per_layer_input=262144, hidden_size_per_layer_input=256,
        altup_num_inputs=4, num_kv_shared_layers=15, laurel_rank=64,
    )
}  # fmt: skip
LEFT_OUT = gemma4.LEFT_OUT

_preset = partial(
    llama.preset, vocab=262400, model_type="gemma3n_text", head_dim=256, max_position_embeddings=32768,
    tie_word_embeddings=True,
)  # fmt: skip
PRESETS = {
    "gemma-3n-E2B": _preset(30, 8, 2, 2048, 8192, num_kv_shared_layers=10,
                            activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20),
    "gemma-3n-E4B": _preset(35, 8, 2, 2048, 16384, num_kv_shared_layers=15,
                            activation_sparsity_pattern=[0.95] * 10 + [0.0] * 25),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, attention_bias=False, altup_active_idx=0, altup_correct_scale=True)
    n = hf["num_hidden_layers"]
    layers = hf.get("layer_types") or [("full" if (i + 1) % 5 == 0 else "sliding") + "_attention" for i in range(n)]
    widths = hf["intermediate_size"] if isinstance(hf["intermediate_size"], list) else [hf["intermediate_size"]]
    if len({*widths}) != 1:
        raise UserError(f"config.json: 'intermediate_size': {widths}: expected one size for all layers")
    return llama.config(hf | {"intermediate_size": widths[0], "rope_parameters": None}) | {
        "attention_scale": 1.0,
        "qk_norm": "head",
        "value_norm": True,
        "post_norm": True,
        "n_stream": hf["altup_num_inputs"],
        "laurel_rank": hf["laurel_rank"],
        "layer_input_size": hf["hidden_size_per_layer_input"],
        "layer_vocab_size": hf["vocab_size_per_layer_input"],
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "logit_softcap": hf["final_logit_softcapping"],
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "activation": activation(hf.get("hidden_activation") or "gelu_pytorch_tanh"),
        "kv_layers": gemma4.kv_layers(layers, hf["num_kv_shared_layers"]),
        **windows(hf | {"layer_types": layers}, layers),
        **two_ropes(hf, base=1e6, local_base=1e4),
        **sparsity(hf.get("activation_sparsity_pattern"), n),
    }


def sparsity(pattern: list[float] | float | None, n: int) -> dict[str, Any]:
    """Return which layers keep few of their activations, and how few, from a number for each of n layers.

    Raises:
        UserError: there are several numbers besides 0.
    """
    if pattern is None:
        pattern = [0.95] * 10 + [0.0] * (n - 10) if n > 10 else [0.0] * n
    pattern = pattern if isinstance(pattern, list) else [pattern] * n
    sparse = [layer for layer, part in enumerate(pattern) if part]
    if len({pattern[layer] for layer in sparse}) > 1:
        raise UserError("config.json: 'activation_sparsity_pattern': expected one number, and 0 in the other layers")
    return {"sparse_layers": sparse, "sparsity": pattern[sparse[0]] if sparse else 0.0}


def weights(config: Config) -> Table:
    layer, altup = "model.layers.{}.", "model.layers.{}.altup."
    table: dict[str, str | Place] = {
        **gemma.weights(config),
        **gemma4.layer_inputs(),
        **{f"streams.into.{i}": f"model.altup_projections.{i}" for i in range(config.n_stream - 1)},
        **{f"streams.out.{i}": f"model.altup_unembed_projections.{i}" for i in range(config.n_stream - 1)},
        "h.{}.altup.norm": altup + "router_norm",
        "h.{}.altup.router": Named((altup + "modality_router.weight",)),
        "h.{}.altup.prediction": Named((altup + "prediction_coefs.weight",)),
        "h.{}.altup.correction": Named((altup + "correction_coefs.weight",)),
        "h.{}.altup.output_scale": Named((altup + "correct_output_scale",)),
        "h.{}.laurel.down": layer + "laurel.linear_left",
        "h.{}.laurel.up": layer + "laurel.linear_right",
        "h.{}.laurel.norm": layer + "laurel.post_laurel_norm",
    }
    for i in range(config.n_layer):
        rows = {f"model.layers.{i}.self_attn.{x}_proj": n for x, n in zip("qkv", config.qkv_rows(i), strict=True) if n}
        table[f"h.{i}.attn.qkv"] = Stacked(tuple(rows), tuple(rows.values()))
    return table


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Gemma3nTextConfig

    size = tiny_size(
        **dict(num_hidden_layers=4, num_key_value_heads=2, head_dim=8, sliding_window=5, pad_token_id=None,
               hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=2, final_logit_softcapping=3.0,
               layer_types=2 * ["sliding_attention", "full_attention"], altup_num_inputs=3,
               activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0]) | fields
    )  # fmt: skip
    return {"gemma3n": Gemma3nTextConfig(**size, vocab_size_per_layer_input=size["vocab_size"] - 2)}
