"""Compiles blocks for `--compile`, which makes a training step faster than torch's own operators do.

On a CPU it uses the C++ kernels of lit_gpt/kernels/cpp. On CUDA torch.compile makes kernels of what surrounds the
matrix products and attention: of one block, for all layers and for rows of any length.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from lit_gpt.errors import UsageError
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, Block, BlockExecution
from lit_gpt.training.args import TrainArgs


def compiles_blocks(args: TrainArgs, config: Config, quantize: str | None, device: str) -> bool:
    """Return whether torch.compile is to serve the blocks: only if asked for, since it is not measured on a GPU yet.

    Raises:
        UsageError: it is asked for and cannot serve.
    """
    if device != "cuda" or args.memory.compile is not True:
        return False
    strategy = args.devices.strategy
    obstacles = {
        "routed experts": config.n_expert,
        "quantized weights": quantize,
        "token mixers besides attention": config.other_mixers,
        f"--strategy {strategy}": strategy in ("fsdp", "deepspeed"),
    }
    for name, present in obstacles.items():
        if present:
            raise UsageError(f"--compile true: does not go with {name}; leave it out")
    return True


def compile_blocks(model: GPT, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile what comes before and after the attention of a block, once for all layers.

    Attention itself stays outside, as its kernels are whole already and take the lengths of the samples as numbers: to
    compile for these would be to compile for every row. Only training is compiled: a validation is too short to pay.
    """
    stages = [torch.compile(stage, backend=backend) for stage in (Block.pre_attention, Block.post_attention)]
    for block in cast(Iterable[Block], model.h):
        block.execution = CompiledExecution(block.execution, *stages)


class CompiledExecution(BlockExecution):
    """Runs compiled stages in training, within another execution."""

    def __init__(self, inner: BlockExecution, pre: Callable[..., Any], post: Callable[..., Any]) -> None:
        self.inner, self.pre, self.post = inner, pre, post

    def run(self, block: Block, *inputs: Any) -> Tensor:
        return self.inner.run(block, *inputs)

    def pre_attention(self, block: Block, *inputs: Any) -> tuple[Tensor, ...]:
        return run_stage(self.pre, block, inputs) if torch.is_grad_enabled() else block.pre_attention(*inputs)

    def post_attention(self, block: Block, *inputs: Any) -> Tensor:
        return run_stage(self.post, block, inputs) if torch.is_grad_enabled() else block.post_attention(*inputs)


def run_stage(compiled: Callable[..., Any], block: Block, inputs: tuple[Any, ...]) -> Any:
    """Run a compiled stage, which is compiled once for any number of tokens."""
    for tensor in inputs:
        for part in tensor if isinstance(tensor, tuple) else (tensor,):
            if part is not None:
                torch._dynamo.maybe_mark_dynamic(part, part.ndim - 2)  # the tokens, so that no length is compiled for
    for layer in block.modules():
        if isinstance(keys := getattr(layer, "keys", None), Tensor):  # of what drops inputs, see lit_gpt.model.noise
            torch._dynamo.maybe_mark_dynamic(keys, 0)
    return compiled(block, *inputs)
