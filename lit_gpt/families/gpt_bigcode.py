"""GPT-BigCode (Allal et al. 2023, SantaCoder; Li et al. 2023, StarCoder): GPT-2 whose heads share one key and value."""

from typing import Any

from lit_gpt.families import gpt2
from lit_gpt.families.fields import refuse
from lit_gpt.families.tables import Grouped, Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("gpt_bigcode",)
DERIVED = gpt2.DERIVED


def _preset(layers: int, heads: int, hidden: int, vocab: int = 49152, positions: int = 8192) -> dict[str, Any]:
    return dict(
        model_type="gpt_bigcode", n_layer=layers, n_head=heads, n_embd=hidden, n_inner=4 * hidden, vocab_size=vocab,
        n_positions=positions, multi_query=True,
    )  # fmt: skip


PRESETS = {
    "gpt_bigcode-santacoder": _preset(24, 16, 2048, 49280, 2048),
    "starcoderbase-1b": _preset(24, 16, 2048),
    "starcoderbase-3b": _preset(36, 22, 2816),
    "starcoderbase-7b": _preset(42, 32, 4096),
    "starcoder": _preset(40, 48, 6144),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, scale_attn_weights=True, add_cross_attention=False)
    groups = 1 if hf.get("multi_query", True) else hf["n_head"]
    return gpt2.config({"activation_function": "gelu_pytorch_tanh"} | hf) | {"n_query_groups": groups}


def weights(config: Config) -> Table:
    layer = "transformer.h.{}."
    qkv = (layer + "attn.c_attn",)
    return {
        **gpt2.weights(config),
        "h.{}.attn.qkv": qkv[0] if config.n_query_groups == 1 else Grouped(qkv, config.n_head, 1),
        "h.{}.attn.proj": layer + "attn.c_proj",
        "h.{}.mlp.fc": layer + "mlp.c_fc",
        "h.{}.mlp.proj": layer + "mlp.c_proj",
    }


ARCHITECTURES = ("starcoder",)


def gguf(config: Config) -> Layout:
    return gpt2.fused("starcoder")


def from_gguf(said: Said) -> dict[str, Any]:
    own = {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode"}
    heads = said.need("attention.head_count", int)
    return gpt2.from_gguf(said) | own | {"multi_query": said.get("attention.head_count_kv", int, heads) == 1}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GPTBigCodeConfig

    size: dict[str, Any] = dict(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_inner=112, n_positions=64, bos_token_id=1, eos_token_id=2
    ) | fields  # fmt: skip
    return {"multi-head": GPTBigCodeConfig(**size, multi_query=False), "multi-query": GPTBigCodeConfig(**size)}
