"""Folds LoRA's updates into the base's weights, in a model or into a file."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.checkpoints.folder import fingerprint
from lit_gpt.errors import UserError
from lit_gpt.hardware import on_meta
from lit_gpt.methods.lora.layers import lora_layers
from lit_gpt.methods.method import LinearWrapper, with_weight
from lit_gpt.methods.parts import TrainedPart, settle, trained_parameters
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.model.moe import Experts
from lit_gpt.model.noise import Noise
from lit_gpt.quantization.modules import Quantized, QuantizedLinear, weight_of


def merge(model: GPT) -> GPT:
    """Fold the updates into the base's weights and unwrap them, in place.

    Quantized layers become plain linear ones, but for those of int4 with updates of their zero points (qa).

    Raises:
        UserError: another method has changed an adapted layer.
    """
    config = merged_config(model)
    for path, layer in lora_layers(model).items():
        linear = layer.linear
        if not isinstance(linear, nn.Linear | Experts | QuantizedLinear):
            raise UserError(f"LoRA cannot be merged into {path}, which another method has changed; leave it apart")
        zeros = layer.shifted_zeros()
        if zeros is None:
            bias = layer.merged_parameter("bias") if layer.bias_shift is not None else None
            linear = with_weight(linear, layer.merged(), model.dtype)
            if bias is not None:
                linear.bias = nn.Parameter(bias.to(model.dtype), requires_grad=False)
        else:
            linear.get_parameter("zero").data = zeros
        model.set_submodule(path, linear)
    model._modules.pop("lora_shared", None)
    model.noise = Noise()
    model.config = config
    return settle(model)


def merged_config(model: GPT) -> Config:
    """Return the Config of the merged model, in which a tied head that was adapted is a weight of its own."""
    return replace(model.config, tie_embeddings=False) if "lm_head" in lora_layers(model) else model.config


def stays_quantized(model: GPT) -> bool:
    """Return whether all updates are ones of zero points that the base has."""
    layers = lora_layers(model).values()
    return len(layers) > 0 and all(layer.shifted_zeros() is not None for layer in layers)


def write_shifted(folder: Path, base: BaseCheckpoint, model: GPT) -> None:
    """Write the weights of a merged model that `stays_quantized` into a checkpoint folder that has all but them.

    They are those of its base, but for the zero points and parts that trained themselves: the checkpoint is one of its
    own, to which no file of the base fits any more.
    """
    found = {f"{path}.zero": layer.shifted_zeros() for path, layer in lora_layers(model).items()}
    own = {name: zero for name, zero in found.items() if zero is not None} | trained_parameters(model)
    tensors = base.state.items() if base.is_quantized else base.quantized(base.dtype)
    shifted = ((name, own.get(name, tensor)) for name, tensor in tensors)
    replace(base, fingerprint=fingerprint(own)).write_quantized(folder, shifted, own_codes=True)


def write_merged(path: Path, model: GPT, dtype: torch.dtype | None = None) -> None:
    """Write the state dict of the model with what was trained merged into it, holding one tensor at a time.

    What is quantized is dequantized.

    Args:
        dtype: in which to store it; None: as the base is.
    """
    config = merged_config(model)
    with on_meta():
        names = GPT(config).state_dict()
    if config.tie_embeddings:
        del names["lm_head.weight"]  # the embedding's
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    layout = {name: names[name].to(dtype or stored_dtype(name, layer, model.dtype)) for name, layer in layers.items()}
    io.write_streamed(path, layout, ((name, merged_tensor(name, layer, dtype)) for name, layer in layers.items()))


def stored_dtype(name: str, layer: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a layer's tensor has once merged: `dtype` if the layer is quantized now, else its own."""
    while isinstance(layer, LinearWrapper):
        layer = layer.linear
    if isinstance(layer, TrainedPart):
        return layer.dtype
    return dtype if isinstance(layer, Quantized) else getattr(layer, name.rpartition(".")[2]).dtype


def merged_tensor(name: str, layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor `name` of a layer, with what was trained of it in it."""
    kind = name.rpartition(".")[2]
    if merged := getattr(layer, "merged_parameter", None):
        return merged(kind, dtype)
    return weight_of(layer) if kind == "weight" else getattr(layer, kind)
