"""Cross-entropy from hidden states, without ever holding the logits of a whole batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.kernels import ops
from lit_gpt.kernels.functional import triton_kernels
from lit_gpt.kernels.linear import arithmetic
from lit_gpt.kernels.policy import policy
from lit_gpt.kernels.trials import Sample, ramp, row_count, sampled
from lit_gpt.quantization.modules import keep_dequantized

# Logits held at a time, in elements: 16 MiB in float32. Larger pieces are hardly faster on a CPU with a frozen head.
# Where a piece must be worth widening the head's weights, or adding to their gradient, eight times as many are held;
# on other devices 32 times as many, in whole tiles of a product: there a small piece is mostly kernel launches; and 64
# times, 4,096 rows of Falcon's, where the gradient takes the place of the logits and no copy in float32 is made.
MAX_LOGITS = 2**22
TILE = 128  # rows


def summed_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    postprocess: Callable[[Tensor], Tensor] = lambda logits: logits,
    over: Callable[[slice], AbstractContextManager[None]] = lambda rows: nullcontext(),
) -> Tensor:
    """Return the sum over n tokens of the cross-entropy of `postprocess(head(hidden))`, in nats.

    Args:
        head: any module from (n, n_embd) to (n, vocabulary).
        hidden: (n, n_embd).
        labels: int64 (n,).
        postprocess: makes logits of the head's output.
        over: returns the context in which the head trains on these of the n tokens.

    Returns:
        float32 scalar. Logits are turned to float32 before the softmax.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    with keep_dequantized(head, arithmetic(hidden.device, hidden.dtype)):
        if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
            return _ChunkedLoss.apply(head, postprocess, over, labels, hidden, *parameters)
        chunks = _chunks(head, hidden, labels, trained=False)
        losses = [F.cross_entropy(postprocess(head(h)).float(), y, reduction="sum") for h, y in chunks]
    return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)


def log_probabilities(
    head: nn.Module, hidden: Tensor, labels: Tensor, postprocess: Callable[[Tensor], Tensor] = lambda logits: logits
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each label, float32 (n,), and whether it is the likeliest token, bool (n,).

    Of equal logits the first is the likeliest, as for `argmax`. The arguments are those of `summed_cross_entropy`.
    """
    results = []
    for rows, row_labels in _chunks(head, hidden, labels, trained=False):
        logits = postprocess(head(rows)).float()
        log_p = -F.cross_entropy(logits, row_labels, reduction="none")
        results.append((log_p, logits.argmax(-1) == row_labels))
    if not results:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.bool)
    log_ps, are_likeliest = zip(*results, strict=True)
    return torch.cat(log_ps), torch.cat(are_likeliest)


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy, float32, and its gradient in the logits' dtype; both computed in float32.

    The gradient may take the memory of the logits.
    """
    kernels = ops if ops.supports("cross-entropy", (logits.size(-1),), logits) else triton_kernels(logits)
    if kernels is not None and logits.is_contiguous():
        return kernels.cross_entropy_(logits, labels).sum(), logits
    p = logits.float().softmax(-1)
    log_sum = logits.amax(-1).float() - p.amax(-1).log()  # the likeliest token's probability is never too small
    at = labels.unsqueeze(1)
    loss = (log_sum - logits.gather(1, at).squeeze(1).float()).sum()
    return loss, p.scatter_add_(1, at, p.new_full((), -1.0).expand(at.shape)).to(logits.dtype)


@sampled("cross-entropy")
def _cross_entropy_sample(dtype: torch.dtype, size: int) -> Sample:
    logits = ramp(row_count(size), size, dtype=dtype).detach()
    labels = torch.arange(len(logits)) % size
    return lambda: _loss_and_gradient(logits, labels)


def _chunks(
    head: nn.Module, hidden: Tensor, labels: Tensor, trained: bool, in_place: bool = False
) -> list[tuple[Tensor, Tensor]]:
    on_cpu = hidden.device.type == "cpu" and not policy().simulate_cuda
    widened = arithmetic(hidden.device, hidden.dtype) != hidden.dtype
    limit = MAX_LOGITS * ((8 if trained or widened else 1) if on_cpu else 64 if in_place else 32)
    size = max(1, limit // int(head.out_features))  # type: ignore[arg-type]  # torch: attributes are tensors or modules
    if not on_cpu and size > TILE:
        size -= size % TILE
    return list(zip(hidden.split(size), labels.split(size), strict=True))


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradients chunk by chunk in the forward pass, while each chunk's logits are at hand.

    The loss is a scalar, so the gradient that comes from above is one factor and can be multiplied on later. Unlike
    checkpointing this computes no logits twice.
    """

    @staticmethod
    def forward(ctx, head, postprocess, over, labels, hidden, *parameters):
        total = hidden.new_zeros((), dtype=torch.float32)
        grads: list[Tensor] = []
        hidden_grads, start = [], 0
        trained, in_place = sum(p.numel() for p in parameters) > MAX_LOGITS, triton_kernels(hidden) is not None
        for rows, row_labels in _chunks(head, hidden, labels, trained, in_place):
            start, here = start + len(rows), slice(start, start + len(rows))
            with torch.enable_grad(), over(here):
                rows = rows.detach().requires_grad_()
                logits = postprocess(head(rows))
            loss, logits_grad = _loss_and_gradient(logits.detach(), row_labels)
            row_grad, *parameter_grads = torch.autograd.grad(logits, [rows, *parameters], logits_grad)
            total += loss
            hidden_grads.append(row_grad)
            if grads:
                grads = [grad.add_(piece) for grad, piece in zip(grads, parameter_grads, strict=True)]
            else:
                grads = parameter_grads
        grads = grads or [torch.zeros_like(p) for p in parameters]
        ctx.save_for_backward(torch.cat(hidden_grads) if hidden_grads else torch.zeros_like(hidden), *grads)
        return total

    @staticmethod
    def backward(ctx, factor):
        grads = (grad * factor for grad in ctx.saved_tensors)  # by float32, in the gradients' dtype
        return None, None, None, None, *grads
