"""Quantize with text to calibrate on: rounding that makes up for its own errors.

GPTQ (Frantar et al. 2022) rounds a weight's columns one after another, and has those to come make up for the error of
each, as the layer's inputs allow. Here two streams of hidden states go through the blocks, one through the weights as
they were and one through those quantized so far, and it is the first that each layer is to reproduce from the inputs of
the second: before it is rounded, the weight is moved to where it does so best (least squares). A layer whose output is
added to the hidden states makes up for what these have lost before it, too.

Memory: the two streams, the block in work, and some matrices (in_features, in_features) in float32.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lit_gpt.checkpoints.base_model import BaseCheckpoint, skeleton
from lit_gpt.data import dataset
from lit_gpt.data.sources import READERS, Source
from lit_gpt.errors import UsageError, UserError, reason
from lit_gpt.files import read_text
from lit_gpt.generation.engine import decode
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps import FastStep
from lit_gpt.hardware import default_device, page_out
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.rope import Rotation
from lit_gpt.quantization import gptq
from lit_gpt.quantization.formats import FORMATS, FourBit
from lit_gpt.quantization.formats import decode as dequantize
from lit_gpt.quantization.gptq import Statistics
from lit_gpt.text.tokenizer import Tokenizer

SEQUENCE = 512  # tokens of a sequence
BATCH_TOKENS = 2048  # tokens that go through a block at a time


def read_ids(path: Path, tokenizer: Tokenizer, tokens: int) -> Tensor:
    """Read the first `tokens` token ids of a file of rows or text, or of a folder of prepared data; int64 (n,)."""
    try:
        if path.is_dir():
            dataset.read_meta(path, tokenizer, "--calibration_path")
            return dataset.Dataset(path, "train").tokens[:tokens].long()
        if path.suffix.lower() not in READERS:
            return tokenizer.encode(read_text(path))[:tokens]
    except OSError as error:
        raise UserError(f"--calibration_path {path}: cannot be read ({reason(error)})") from None
    parts: list[Tensor] = []
    count = 0
    for row in Source(str(path)).rows():
        if row.problem:
            raise UserError(f"--calibration_path {row.where}: {row.problem}")
        parts.append(tokenizer.encode("\n".join(texts(row.fields)) + "\n\n"))
        count += len(parts[-1])
        if count >= tokens:
            break
    return torch.cat(parts)[:tokens] if parts else torch.zeros(0, dtype=torch.long)


def texts(value: Any) -> Iterator[str]:
    """Yield all text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def given_text(path: Path | None, tokens: int, base: BaseCheckpoint) -> Tensor | None:
    """Read the text to calibrate on from --calibration_path, int64 (n, T); return None if the model is to write it.

    Raises:
        UsageError: --calibration_tokens are fewer than a sequence, or the blocks are more than one after another.
        UserError: the path cannot be read or holds too little.
    """
    length = sequence_length(base)
    if base.config.kv_layers or base.config.layer_input_size:
        raise UsageError(
            f"--rounding calibrated: layers of {base.config.name} share keys and values, or have inputs of their own, "
            "and are not calibrated one by one; take --rounding nearest"
        )
    if tokens < length:
        raise UsageError(f"--calibration_tokens {tokens}: expected {length} or more")
    if path is None:
        return None
    ids = read_ids(path, Tokenizer(base.checkpoint_dir), tokens)
    if len(ids) < length:
        raise UserError(
            f"--calibration_path {path}: holds {len(ids)} tokens, expected {length} or more; give a "
            "longer text, or leave the flag out to calibrate on the model's own"
        )
    if ids.max() >= base.config.padded_vocab_size:
        raise UserError(f"--calibration_path {path}: holds the id {ids.max()}, which the model lacks")
    return ids[: len(ids) // length * length].view(-1, length)


def sequence_length(base: BaseCheckpoint) -> int:
    """Return the tokens of a calibration sequence, which the model's context may shorten."""
    return min(SEQUENCE, base.config.block_size)


@torch.no_grad()
def own_text(base: BaseCheckpoint, tokens: int, device: torch.device) -> Tensor:
    """Let the model itself write the text (Liu et al. 2023, LLM-QAT), for which it is loaded whole; int64 (n, T).

    The temperature is 1, and the first token of each sequence is drawn evenly.
    """
    length = sequence_length(base)
    n = tokens // length
    print(f"writing {n * length} tokens of text to calibrate on", file=sys.stderr)
    model, tokenizer = replace(base, quantize=None).build(device=device), Tokenizer(base.checkpoint_dir)
    generator = torch.Generator(device).manual_seed(0)
    known = min(tokenizer.vocab_size, model.config.vocab_size)
    first = torch.randint(known, (n,), generator=generator, device=device).tolist()
    rows = [DecodingRow([token], length - 1, generator) for token in first]
    new = decode(model, rows, model.kv_cache(n, length), step=FastStep(model))
    for _ in tqdm(new, total=n * (length - 1), unit="token", disable=None):
        pass
    return torch.tensor([row.ids for row in rows], device=device)


def tensors(base: BaseCheckpoint, text: Tensor | None, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the quantized model's state dict, calibrated on `text` (n, T) or on the model's own.

    The model writes, which takes long, when the first tensor is asked for: once there is room on the disk.
    """
    device = default_device()
    ids = own_text(base, tokens, device) if text is None else text.to(device)
    yield from calibrated(base, ids, base.dtype)


@torch.no_grad()
def calibrated(base: BaseCheckpoint, ids: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the quantized model's state dict, name and tensor, like BaseCheckpoint.quantized; on the device of `ids`.

    Args:
        ids: the text to calibrate on, int64 (n, T).

    Raises:
        UserError: weights that are not numbers.
    """
    name = base.quantize or ""
    quantizer = FORMATS[name]
    assert isinstance(quantizer, FourBit), "8 bits are not calibrated"
    chosen = {f"h.{i}.{path}.weight" for i in range(base.config.n_layer) for path in linears(base.config, i)}
    others = {key: tensor for key, tensor in base.state.items() if key not in chosen}
    yield from replace(base, state=others).quantized(dtype, ids.device)
    exact, quantized = (streams(base, ids, dtype, quantize) for quantize in (False, True))
    positions = torch.arange(ids.size(1), device=ids.device)
    rotations = model_of(base).rotations(positions, (ids.size(1),), dtype)
    for layer in tqdm(range(base.config.n_layer), unit="block", disable=None):
        true, block = (block_of(base, layer, dtype, ids.device) for _ in range(2))
        for path in linears(base.config, layer):
            stats = statistics(true, block, path, exact, quantized, rotations[layer])
            weight = true.get_parameter(f"{path}.weight").float()
            parts = gptq.quantize(weight, stats, quantizer, dtype)
            if not all(part.isfinite().all() for part in parts.values() if part.is_floating_point()):
                source = base.checkpoint_dir / "lit_model.pth"
                raise UserError(f"{source}: h.{layer}.{path}.weight or its inputs are not numbers")
            rounded = dequantize(parts, name, weight.size(1), dtype)
            block.get_submodule(path).weight = nn.Parameter(rounded)
            yield from ((f"h.{layer}.{path}.{key}", part) for key, part in parts.items())
        exact = [true(x, rotations[layer], None, None) for x in exact]
        quantized = [block(x, rotations[layer], None, None) for x in quantized]
        for key in block.state_dict():
            page_out(base.state[f"h.{layer}.{key}"])


def model_of(base: BaseCheckpoint) -> GPT:
    """Return the model of a checkpoint on the meta device, without contents."""
    with torch.device("meta"):
        return GPT(base.config)


def linears(config: Config, layer: int) -> list[str]:
    """Return the paths of a block's linear layers, in the order in which they compute."""
    with torch.device("meta"):
        return [path for path, module in Block(config, layer).named_modules() if isinstance(module, nn.Linear)]


def block_of(base: BaseCheckpoint, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
    """Load one block of the checkpoint, unquantized."""
    with torch.device("meta"):
        block = Block(base.config, layer)
    prefix = f"h.{layer}."
    state = {name.removeprefix(prefix): t for name, t in base.state.items() if name.startswith(prefix)}
    block.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return block.eval()


def streams(base: BaseCheckpoint, ids: Tensor, dtype: torch.dtype, quantize: bool) -> list[Tensor]:
    """Compute the hidden states before the first block, (B, T, n_embd) for each batch of sequences."""
    model = skeleton(base.config, dtype, base.quantize) if quantize else model_of(base)
    state = {name: tensor for name, tensor in base.state.items() if name.startswith(("wte.", "wpe."))}
    pairs = replace(base, state=state).quantized(dtype, ids.device) if quantize else state.items()
    for name, tensor in pairs:
        path, _, key = name.rpartition(".")
        new = tensor.to(ids.device, dtype if tensor.is_floating_point() else None)
        setattr(model.get_submodule(path), key, nn.Parameter(new, requires_grad=False))
    positions = torch.arange(ids.size(1), device=ids.device)
    parts = ids.split(max(1, BATCH_TOKENS // ids.size(1)))
    return [model.embed(part, positions, (ids.size(1),)) for part in parts]


class Reached(Exception):
    """End a block's forward pass at the layer whose input is wanted."""


def layer_input(block: Block, path: str, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor | None]:
    """Return the input of a block's linear layer, (B, T, in_features), and the residual that its output is added to.

    The residual (B, T, out_features) is None where the output is not added to the hidden states.
    """
    seen: dict[str, Tensor] = {}

    def reach(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["input"] = inputs[0]
        raise Reached

    def attended(_: nn.Module, __: Any, output: Tensor) -> None:
        seen["attended"] = output

    hooks = [
        block.get_submodule(path).register_forward_pre_hook(reach),
        block.post_norm_1.register_forward_hook(attended),
    ]
    try:
        block(x, rotation, None, None)
    except Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not path.endswith(".proj") or not isinstance(block.post_norm_1, nn.Identity):
        return seen["input"], None
    return seen["input"], torch.add(x, seen["attended"], alpha=block.scale) if "attended" in seen else x


def statistics(
    true: Block, block: Block, path: str, exact: list[Tensor], quantized: list[Tensor], rotation: Rotation | None
) -> Statistics:
    """Return the statistics of a linear layer over both streams.

    Args:
        true, block: the block with the exact weights, and with those of the layers before this one quantized.
        path: the layer's path in the block.
        exact, quantized: the streams' hidden states before the block, (B, T, n_embd) each.
    """
    out_features, in_features = true.get_parameter(f"{path}.weight").shape
    sums = Statistics.zeros(out_features, in_features, exact[0].device)
    for x, y in zip(exact, quantized, strict=True):
        exact_input, exact_residual = layer_input(true, path, x, rotation)
        quantized_input, residual = layer_input(block, path, y, rotation)
        lost = None if residual is None or exact_residual is None else exact_residual - residual
        sums.add(exact_input, quantized_input, lost, 1 / block.scale)
    return sums
