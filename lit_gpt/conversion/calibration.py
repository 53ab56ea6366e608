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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.data import dataset
from lit_gpt.data.sources import READERS, Source
from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation.engine import decode
from lit_gpt.generation.sequence import Row
from lit_gpt.generation.steps import FastStep
from lit_gpt.hardware import page_out
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.rope import Rotation
from lit_gpt.quantization.formats import FORMATS, FourBit, Tensors
from lit_gpt.quantization.formats import decode as dequantize
from lit_gpt.quantization.gptq import gptq
from lit_gpt.text.tokenizer import Tokenizer

LENGTH = 512  # tokens of a sequence
AT_ONCE = 2048  # tokens that go through a block at a time
DAMPING = 0.01  # of the mean of the inputs' squares: what least squares add, so that they do not follow noise


def read_ids(path: Path, tokenizer: Tokenizer, tokens: int) -> Tensor:
    """The first `tokens` token ids of a file of rows or text, or of a folder of prepared data; int64 (n,)."""
    try:
        if path.is_dir():
            dataset.read_meta(path, tokenizer, "--calibration_path")
            return dataset.Dataset(path, "train").tokens[:tokens].long()
        if path.suffix not in READERS:
            return tokenizer.encode(path.read_text(encoding="utf-8"))[:tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration_path {path}: cannot be read ({error})") from None
    found, count = [], 0
    for row in Source(str(path)).rows():
        if row.problem:
            raise UserError(f"--calibration_path {row.where}: {row.problem}")
        found.append(tokenizer.encode("\n".join(texts(row.fields)) + "\n\n"))
        count += len(found[-1])
        if count >= tokens:
            break
    return torch.cat(found)[:tokens] if found else torch.zeros(0, dtype=torch.long)


def texts(value: Any) -> Iterator[str]:
    """All text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def given_text(path: Path | None, tokens: int, base: BaseCheckpoint) -> Tensor | None:
    """What to calibrate on from --calibration_path, int64 (n, T); None if the model is to write it.

    Raises:
        UsageError: --calibration_tokens are fewer than a sequence.
        UserError: the path cannot be read or holds too little.
    """
    length = sequence_length(base)
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
    return min(LENGTH, base.config.block_size)


@torch.no_grad()
def own_text(base: BaseCheckpoint, tokens: int, device: torch.device) -> Tensor:
    """Text that the model itself writes, at temperature 1 after a first token drawn evenly; int64 (n, T).

    Liu et al. 2023, LLM-QAT. The whole model is needed for it.
    """
    length = sequence_length(base)
    n = tokens // length
    print(f"writing {n * length} tokens of text to calibrate on", file=sys.stderr)
    model, tokenizer = replace(base, quantize=None).build(device=device), Tokenizer(base.checkpoint_dir)
    generator = torch.Generator(device).manual_seed(0)
    known = min(tokenizer.vocab_size, model.config.vocab_size)
    first = torch.randint(known, (n,), generator=generator, device=device).tolist()
    rows = [Row([token], length - 1, generator) for token in first]
    new = decode(model, rows, model.kv_cache(n, length), 1.0, None, 1.0, step=FastStep(model))
    for _ in tqdm(new, total=n * (length - 1), unit="token", disable=None):
        pass
    return torch.tensor([row.ids for row in rows], device=device)


@torch.no_grad()
def calibrated(base: BaseCheckpoint, ids: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the quantized model, tensor by tensor, as Base.quantized gives it; on the device of `ids`.

    Args:
        ids: int64 (n, T), what to calibrate on.

    Raises:
        UserError: weights that are not numbers.
    """
    chosen = {f"h.{i}.{path}.weight" for i in range(base.config.n_layer) for path in linears(base.config)}
    others = {name: tensor for name, tensor in base.state.items() if name not in chosen}
    yield from replace(base, state=others).quantized(dtype, ids.device)
    exact, found = (streams(base, ids, dtype, quantized) for quantized in (False, True))
    positions = torch.arange(ids.size(1), device=ids.device)
    rotations = model_of(base).rotations(positions, (ids.size(1),), dtype)
    for layer in tqdm(range(base.config.n_layer), unit="block", disable=None):
        true, block = (block_of(base, layer, dtype, ids.device) for _ in range(2))
        for path in linears(base.config):
            linear = block.get_submodule(path)
            stats = Statistics.of(true, block, path, exact, found, rotations[layer])
            tensors = stats.rounded(true.get_submodule(path).weight.float(), FORMATS[base.quantize], dtype)
            if not all(part.isfinite().all() for part in tensors.values() if part.is_floating_point()):
                source = base.checkpoint_dir / "lit_model.pth"
                raise UserError(f"{source}: h.{layer}.{path}.weight or its inputs are not numbers")
            linear.weight = nn.Parameter(dequantize(tensors, base.quantize, linear.in_features, dtype))
            yield from ((f"h.{layer}.{path}.{key}", part) for key, part in tensors.items())
        exact = [true(x, rotations[layer], None, None) for x in exact]
        found = [block(x, rotations[layer], None, None) for x in found]
        for name in block.state_dict():
            page_out(base.state[f"h.{layer}.{name}"])


def model_of(base: BaseCheckpoint) -> GPT:
    with torch.device("meta"):
        return GPT(base.config)


def linears(config: Any) -> list[str]:
    """The linear layers of a block, in the order in which they compute."""
    with torch.device("meta"):
        return [path for path, module in Block(config, 0).named_modules() if isinstance(module, nn.Linear)]


def block_of(base: BaseCheckpoint, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
    with torch.device("meta"):
        block = Block(base.config, layer)
    prefix = f"h.{layer}."
    state = {name.removeprefix(prefix): t for name, t in base.state.items() if name.startswith(prefix)}
    block.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return block.eval()


def streams(base: BaseCheckpoint, ids: Tensor, dtype: torch.dtype, quantized: bool) -> list[Tensor]:
    """The hidden states before the first block, some sequences each."""
    model = base.skeleton(dtype) if quantized else model_of(base)
    state = {name: tensor for name, tensor in base.state.items() if name.startswith(("wte.", "wpe."))}
    pairs = replace(base, state=state).quantized(dtype, ids.device) if quantized else state.items()
    for name, tensor in pairs:
        path, _, key = name.rpartition(".")
        new = tensor.to(ids.device, dtype if tensor.is_floating_point() else None)
        setattr(model.get_submodule(path), key, nn.Parameter(new, requires_grad=False))
    positions = torch.arange(ids.size(1), device=ids.device)
    parts = ids.split(max(1, AT_ONCE // ids.size(1)))
    return [model.embed(part, positions, (ids.size(1),)) for part in parts]


class Reached(Exception):
    """A block has come to the layer that is looked at."""


def at(block: Block, path: str, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor | None]:
    """The input of a linear layer of a block (B, T, in_features); and what its output is added to, if it is."""
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


@dataclass
class Statistics:
    """Of a layer over all tokens, what least squares need: sums of outer products with the quantized stream's inputs,
    (..., in_features) in float32."""

    inputs: Tensor  # of these inputs themselves
    missing: Tensor  # of what the exact ones are beyond them
    lost: Tensor  # of what the exact hidden states are beyond the others, where the layer's output is added

    @classmethod
    def of(
        cls, true: Block, block: Block, path: str, exact: list[Tensor], found: list[Tensor], rotation: Rotation | None
    ) -> "Statistics":
        out, size = true.get_submodule(path).weight.shape
        sums = cls(*(torch.zeros(rows, size, device=exact[0].device) for rows in (size, size, out)))
        for x, y in zip(exact, found, strict=True):
            (a, rest), (b, other) = at(true, path, x, rotation), at(block, path, y, rotation)
            a, b = a.flatten(0, 1).float(), b.flatten(0, 1).float()
            sums.inputs.addmm_(b.T, b)
            sums.missing.addmm_((a - b).T, b)
            if rest is not None:
                sums.lost.addmm_((rest - other).flatten(0, 1).float().T, b, alpha=1 / block.scale)
        return sums

    def rounded(self, weight: Tensor, quantizer: FourBit, dtype: torch.dtype) -> Tensors:
        """The tensors that stand for a layer's weight (out, in), float32; those of open dtype in `dtype`."""
        squares = self.inputs.diagonal()
        squares += DAMPING * squares.mean() + torch.finfo(torch.float32).tiny
        triangle, failed = torch.linalg.cholesky_ex(self.inputs)
        if failed:  # inputs that are not numbers; nor will be what comes of them
            triangle = torch.full_like(triangle, torch.nan)
        shift = torch.cholesky_solve(torch.addmm(self.lost, weight, self.missing).T, triangle).T
        codes, fitted = gptq(weight + shift, squares, torch.cholesky_inverse(triangle), quantizer)
        layout = quantizer.layout(*weight.shape)
        tensors = quantizer.pack(quantizer.tensors(codes, *fitted))
        return {key: tensor.to(layout[key][1] or dtype) for key, tensor in tensors.items()}
