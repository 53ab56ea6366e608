"""Writing a model as a GGUF file, tensor by tensor; tokenizer, chat template and configuration are its metadata."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lit_gpt.conversion.gguf.layout import ROPE_FACTORS, layout_of, places
from lit_gpt.conversion.gguf.tokenizer import vocabulary_fields
from lit_gpt.errors import UserError
from lit_gpt.families.tables import Layout
from lit_gpt.model.config import Config
from lit_gpt.model.rope import rope_frequencies
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip
# Read back, 16 bits hold what 8 and their scale do.
READ_AS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.float16}
# How far logits may be off, relative to their norm. Measured for SmolLM2-135M, with weights that are no bfloat16's:
# 6.6e-4, 4.8e-3 and 2.2e-2. Small random models, whose weights are large, reach twice that.
TOLERANCE = {"f16": 5e-3, "bf16": 3e-2, "q8_0": 5e-2}
NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def write(path: Path, checkpoint_dir: Path, state: dict[str, Tensor], dtype: str, style: PromptStyle | None) -> Layout:
    """Write the model of a state dict, with the tokenizer of `checkpoint_dir`.

    Args:
        dtype: of matrices, a key of KINDS; vectors are float32.
        style: whose template and end tokens go along; None: there is none.

    Raises:
        UserError: llama.cpp does not know the architecture, a setting or the tokenizer, or a value is beyond `dtype`.
    """
    config = Config.from_checkpoint(checkpoint_dir)
    layout, tokenizer = layout_of(config), Tokenizer(checkpoint_dir)
    fields = metadata(config, layout)
    fields |= vocabulary_fields(checkpoint_dir, config.padded_vocab_size, style.stop_ids if style else ())
    if style:
        fields["tokenizer.chat_template"] = style.for_others(tokenizer)
    fields |= {"general.name": config.name, "general.type": "model", "general.file_type": int(FILE_TYPES[dtype])}
    fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION

    table = list(places(config, layout))
    kinds = {place.name: kind_of(place.row.shape, dtype) for place in table}
    factors = rope_factors(config)
    writer = gguf.GGUFWriter(path, layout.architecture)
    for key, value in fields.items():
        add_field(writer, key, value)
    if factors is not None:
        announce(writer, ROPE_FACTORS, factors.shape, Kind.F32)
    for place in table:
        with torch.device("meta"):
            shape = place.to_gguf(torch.empty(place.row.shape)).shape
        announce(writer, place.name, shape, kinds[place.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for place in table:
        writer.write_tensor_data(encoded(place.to_gguf(state[place.row.lit]), kinds[place.name], place.name))
    writer.close()
    return layout


def announce(writer: gguf.GGUFWriter, name: str, shape: torch.Size, kind: Kind) -> None:
    """Enter a tensor that is to follow. Where numpy has no such type, the last dimension counts bytes."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = math.prod(shape) // block * size
    plain = {Kind.F32: np.float32, Kind.F16: np.float16}.get(kind)
    stored = shape if plain else (*shape[:-1], shape[-1] // block * size)
    writer.add_tensor_info(name, stored, np.dtype(plain or np.uint8), nbytes, kind)


def kind_of(shape: torch.Size, dtype: str) -> Kind:
    """Vectors are float32; rows that do not divide into blocks are float16, as llama.cpp does."""
    if len(shape) == 1:
        return Kind.F32
    return KINDS[dtype] if shape[-1] % gguf.GGML_QUANT_SIZES[KINDS[dtype]][0] == 0 else Kind.F16


def encoded(tensor: Tensor, kind: Kind, name: str) -> np.ndarray:
    tensor = tensor.float()
    if kind == Kind.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"{name}: holds values beyond float16; export with --dtype bf16 or f32")
    return gguf.quants.quantize(tensor.contiguous().numpy(), kind)


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add metadata by the type of its value."""
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    if value is not None:
        kinds.get(type(value), writer.add_array)(key, value)


def metadata(config: Config, layout: Layout) -> dict[str, Any]:
    """What llama.cpp has of a model's architecture, in its words."""
    window = None if layout.keeps_window else config.sliding_window
    eps = "layer_norm_epsilon" if config.norm_class == "LayerNorm" else "layer_norm_rms_epsilon"
    fields = {
        "block_count": config.n_layer,
        "context_length": min(config.block_size, window or config.block_size),
        "embedding_length": config.n_embd,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_query_groups,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        f"attention.{eps}": config.norm_eps,
        "rope.dimension_count": config.rope_n_elem,
        "rope.freq_base": config.rope_base,
        "vocab_size": config.padded_vocab_size,
        **rope_scaling(config),
        **layout.metadata,
    }
    return {f"{layout.architecture}.{key}": value for key, value in fields.items()}


def rope_scaling(config: Config) -> dict[str, Any]:
    scaling = config.rope_scaling
    if not scaling or scaling["rope_type"] == "llama3":
        return {}
    key = "rope.scaling."
    if scaling["rope_type"] == "linear":
        return {key + "type": "linear", key + "factor": float(scaling["factor"])}
    plain = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
    further = sorted(name for name, value in scaling.items() if name not in plain and value is not None)
    if scaling["rope_type"] != "yarn" or further or not scaling.get("truncate", True):
        what = ", ".join(further) or ("truncate" if scaling["rope_type"] == "yarn" else scaling["rope_type"])
        raise UserError(f"--format gguf: rotary scaling with {what} is not known of llama.cpp")
    return {
        key + "type": "yarn",
        key + "factor": float(scaling["factor"]),
        key + "original_context_length": scaling.get("original_max_position_embeddings") or config.block_size,
        key + "yarn_beta_fast": float(scaling.get("beta_fast") or 32),
        key + "yarn_beta_slow": float(scaling.get("beta_slow") or 1),
    }


def rope_factors(config: Config) -> Tensor | None:
    """Llama 3's scaling as llama.cpp has it: a divisor for each frequency."""
    if not config.rope_scaling or config.rope_scaling["rope_type"] != "llama3":
        return None
    return rope_frequencies(replace(config, rope_scaling=None))[0] / rope_frequencies(config)[0]
