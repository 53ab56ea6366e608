"""Write a model as a GGUF file, tensor by tensor; tokenizer, chat template and configuration are its metadata."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lit_gpt.conversion import weights
from lit_gpt.conversion.gguf.layout import DIVIDED, ROPE_FACTORS, layout_of, rope_divisors, rows
from lit_gpt.conversion.gguf.metadata import metadata
from lit_gpt.conversion.gguf.tokenizer import vocabulary_fields
from lit_gpt.errors import UserError
from lit_gpt.families.tables import Layout
from lit_gpt.hardware import DTYPES
from lit_gpt.model.config import Config
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

KINDS = {"fp32": Kind.F32, "fp16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
WIDE = re.compile(r"(_norm|conv1d|shortconv\.conv|ffn_gate_inp|position_embd)\.weight$")  # stored in float32
READ_AS = DTYPES | {"q8_0": torch.float16}  # read back, 16 bits hold what 8 and their scale do
# How far rounding may move logits, relative to their norm. Measured for SmolLM2-135M, with weights that no bfloat16
# holds: 2.2e-2; in float16 and bfloat16 (see logits.TOLERANCE): 6.6e-4 and 4.8e-3. Small random models, whose weights
# are large, reach twice that.
Q8_0_TOLERANCE = 5e-2


def write(
    path: Path, checkpoint_dir: Path, state: Mapping[str, Tensor], dtype: str, style: PromptStyle | None
) -> Layout:
    """Write the model of a state dict, with the tokenizer of `checkpoint_dir`, and return the layout of its family.

    Args:
        dtype: a key of KINDS, in which matrices are stored; vectors are float32.
        style: the prompt style whose template and end tokens go along, if any.

    Raises:
        UserError: llama.cpp does not know the architecture, a setting or the tokenizer, or a value is beyond `dtype`.
    """
    config = Config.from_checkpoint(checkpoint_dir)
    layout, tokenizer = layout_of(config), Tokenizer(checkpoint_dir)
    fields = metadata(config, layout)
    fields |= vocabulary_fields(checkpoint_dir, config.padded_vocab_size, style.stop_ids if style else ())
    if style:
        fields["tokenizer.chat_template"] = style.for_others(tokenizer)
    file_type = gguf.LlamaFileType["ALL_F32" if dtype == "fp32" else f"MOSTLY_{KINDS[dtype].name}"]
    fields |= {"general.name": config.name, "general.type": "model", "general.file_type": int(file_type)}
    fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION

    table = list(rows(config, layout))
    with torch.device("meta"):
        empty = {row.lit: torch.empty(row.shape) for row in table}
    kinds = {name: kind_of(name, tensor.shape, dtype) for name, tensor in weights.to_hf(table, empty)}
    divided = config.rope_scaling and config.rope_scaling["rope_type"] in DIVIDED
    factors = rope_divisors(config) if divided else None
    writer = gguf.GGUFWriter(path, layout.architecture)
    for key, value in fields.items():
        add_field(writer, key, value)
    if factors is not None:
        announce(writer, ROPE_FACTORS, factors.shape, Kind.F32)
    for name, tensor in weights.to_hf(table, empty):
        announce(writer, name, tensor.shape, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for name, tensor in weights.to_hf(table, state):
        writer.write_tensor_data(encoded(tensor, kinds[name], name))
    writer.close()
    return layout


def announce(writer: gguf.GGUFWriter, name: str, shape: torch.Size, kind: Kind) -> None:
    """Enter a tensor that is to follow. Where numpy has no such type, the last dimension counts bytes."""
    dtype = np.dtype({Kind.F32: "float32", Kind.F16: "float16"}.get(kind, "uint8"))
    stored = gguf.quant_shape_to_byte_shape(shape, kind) if dtype == np.uint8 else shape
    writer.add_tensor_info(name, stored, dtype, math.prod(stored) * dtype.itemsize, kind)


def kind_of(name: str, shape: torch.Size, dtype: str) -> Kind:
    """Return how a tensor is stored: what is no matrix to multiply by, and routers, in float32, and rows that do not
    divide into blocks in float16.

    So does llama.cpp, whose convolutions and recurrences take nothing else.
    """
    if len(shape) == 1 or not name.endswith(".weight") or WIDE.search(name):
        return Kind.F32
    return KINDS[dtype] if shape[-1] % gguf.GGML_QUANT_SIZES[KINDS[dtype]][0] == 0 else Kind.F16


def encoded(tensor: Tensor, kind: Kind, name: str) -> np.ndarray:
    """Return a tensor as it is stored; raise UserError, which names it, for values beyond float16."""
    tensor = tensor.float()
    if kind == Kind.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"{name}: holds values beyond float16; export with --dtype bf16 or fp32")
    return gguf.quants.quantize(tensor.contiguous().numpy(), kind)


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add metadata by the type of its value."""
    adds: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        list: writer.add_array,
    }  # fmt: skip
    if value is not None:
        adds[type(value)](key, value)
