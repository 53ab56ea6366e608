"""`--compile`: what makes a training step fast beyond torch's own operators.

On a CPU these are the C++ kernels of lit_gpt/kernels/cpp. On CUDA torch.compile makes kernels of what surrounds the matrix
products and attention: of one block, for all layers and for rows of any length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UsageError
from lit_gpt.kernels import ops
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, Block


@contextmanager
def kernels_if(wanted: bool | str) -> Iterator[None]:
    """With `--compile false` the C++ kernels are left out while the block runs."""
    if wanted is not False:
        yield
        return
    with ops.off():
        yield


def wanted(hp: SimpleNamespace, config: Config, quantize: str | None, device: str) -> bool:
    """Whether the blocks are to be compiled by torch.compile: only if asked for, for on a GPU it is not yet measured.

    Raises:
        UsageError: it is asked for and cannot be.
    """
    if device != "cuda" or hp.compile is not True:
        return False
    obstacles = {
        "routed experts": config.n_expert,
        "quantized weights": quantize,
        f"--strategy {hp.strategy}": hp.strategy in ("fsdp", "deepspeed"),
    }
    found = next((name for name, there in obstacles.items() if there), None)
    if found:
        raise UsageError(f"--compile true: does not go with {found}; leave it out")
    return True


def compile_blocks(model: GPT, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile what comes before and after the attention of a block, once for all layers.

    Attention itself stays outside, as its kernels are whole already and take the lengths of the samples as numbers: to
    compile for these would be to compile for every row. Only training is compiled: a validation is too short to pay.
    """
    pre_attention, post_attention = (
        torch.compile(function, backend=backend) for function in (Block.pre_attention, Block.post_attention)
    )
    for block in model.h:
        block.pre_attention = partial(in_training, pre_attention, block.pre_attention)
        block.post_attention = partial(in_training, post_attention, block.post_attention)


def in_training(compiled: Callable[..., Any], plain: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(x, *rest)
    for tensor in (x, *rest):
        for part in tensor if isinstance(tensor, tuple) else (tensor,):
            if part is not None:
                torch._dynamo.maybe_mark_dynamic(part, part.ndim - 2)  # the tokens, so that no length is compiled for
    return compiled(plain.__self__, x, *rest)
