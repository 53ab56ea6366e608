"""Routed experts (Shazeer et al. 2017): which of them each token goes to, and their products, one per expert."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import functional
from lit_gpt.kernels.linear import arithmetic, onednn_product, onednn_takes
from lit_gpt.kernels.policy import policy
from lit_gpt.model.config import Config
from lit_gpt.model.norms import PlainRMSNorm

BLOCK = 8  # rows, in which a CPU's kernels take them
ALIGNED = 8  # bfloat16 numbers in 16 bytes, which a kernel for all experts reads at a time


@dataclass(frozen=True)
class Groups:
    """Says which rows are which expert's, where rows are sorted by expert."""

    experts: Tensor  # int64 (rows,), the expert of each row, ascending
    n_expert: int

    @cached_property
    def ends(self) -> Tensor:
        """Where each expert's rows end, int32 (n_expert,), on the rows' device; nobody waits for it."""
        numbers = torch.arange(self.n_expert, device=self.experts.device)
        return torch.searchsorted(self.experts, numbers, right=True, out_int32=True)

    @cached_property
    def counts(self) -> list[int]:
        """How many rows each expert has, 0 for one that no token goes to; the host waits for the device.

        This is the only place where contents of a tensor decide on shapes. Without contents each expert gets as many
        rows as the others: what a step holds does not depend on that, for all rows lie in one tensor.
        """
        if not policy().contents:
            rows, n = len(self.experts), self.n_expert
            return [rows * (i + 1) // n - rows * i // n for i in range(n)]
        return self.experts.bincount(minlength=self.n_expert).tolist()

    def rows_of(self, values: Tensor) -> Tensor:
        """Return for each row what its expert has among values (n_expert, size): (rows, size)."""
        if on_cuda(values):
            return F.embedding(self.experts, values)
        return torch.cat([value.expand(n, -1) for value, n in zip(values, self.counts, strict=True)])


@dataclass(frozen=True)
class Routing:
    """Sorts the rows of N tokens, each repeated for the k experts that it goes to, by expert."""

    order: Tensor  # int64 (N * k,): which of the rows as they come, k for each token, is in each place
    places: Tensor  # int64 (N * k,): its inverse, the place of each of those rows
    groups: Groups  # of the rows as sorted
    k: int  # experts that each token goes to

    @classmethod
    def from_topk(cls, chosen: Tensor, n_expert: int) -> "Routing":
        """Route tokens to the experts `chosen`, int64 (N, k)."""
        experts, order = chosen.flatten().sort(stable=True)
        return cls(order, order.argsort(), Groups(experts, n_expert), chosen.size(1))

    @property
    def tokens(self) -> Tensor:
        """Return which token is in each place, int64 (N * k,)."""
        return self.order // self.k

    def dispatch(self, x: Tensor) -> Tensor:
        """Return the rows of tokens (N, size) sorted by expert, (N * k, size)."""
        return _Permute.apply(x.unsqueeze(1).expand(-1, self.k, -1).flatten(0, 1), self.order, self.places)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Return each token's sum of its sorted rows (N * k, size), weighted by (N, k): (N, size)."""
        by_token = _Permute.apply(y, self.places, self.order).view(*weights.shape, -1)
        return (weights.to(y.dtype).unsqueeze(1) @ by_token).squeeze(1)


class _Permute(torch.autograd.Function):
    """Gives x[order], with a permutation as its gradient, where autograd would add up."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def grouped_product(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply each expert's rows by its weight.

    Args:
        x: (rows, in_features), sorted by expert.
        weight: (n_expert, out_features, in_features).
        groups: which rows are which expert's.

    Returns:
        (rows, out_features), in x's dtype, or autocast's where that is on.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    if not (on_cuda(x) and dtype == torch.bfloat16):
        return _GroupedProduct.apply(x, weight, groups.counts)
    more_out, more_in = (-size % ALIGNED for size in weight.shape[1:])
    if not more_out and not more_in:
        return _KernelProduct.apply(x, weight, groups.ends)
    x, padded = F.pad(x, (0, more_in)), F.pad(weight, (0, more_in, 0, more_out))  # with LoRA of a low rank
    return _KernelProduct.apply(x, padded, groups.ends)[:, : weight.size(1)]


def on_cuda(x: Tensor) -> bool:
    """Return whether to choose as on a CUDA device."""
    return x.is_cuda or policy().simulate_cuda


def scaled_by_expert(y: Tensor, scale: Tensor, shift: Tensor, groups: Groups) -> Tensor:
    """Return scale * (y + shift) with each row's expert's scale and shift.

    Args:
        y: (rows, size), sorted by expert.
        scale, shift: float32 (n_expert, size).
        groups: which rows are which expert's.
    """
    if on_cuda(y):
        shifts, scales = (groups.rows_of(values).to(y.dtype) for values in (scale * shift, scale))
        return torch.addcmul(shifts, y, scales)
    rows = zip(y.split(groups.counts), scale, shift, strict=True)
    return torch.cat([functional.scaled(*expert) for expert in rows])


class _KernelProduct(torch.autograd.Function):
    """Takes the products of all experts in one kernel, which reads on the device where each expert's rows end.

    Keeps the weight, and x if the weight trains. Some kernels leave what they find in memory as the gradient of an
    expert without rows (pytorch/pytorch#172439), hence the zeros.
    """

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, ends)
        return F.grouped_mm(aligned(x), aligned(weight).mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, ends = ctx.saved_tensors
        x_grad = weight_grad = None
        grad = aligned(grad)
        if ctx.needs_input_grad[0]:
            x_grad = F.grouped_mm(grad, aligned(weight), offs=ends)
        if ctx.needs_input_grad[1]:
            empty = ends.diff(prepend=ends.new_zeros(1)) == 0
            weight_grad = F.grouped_mm(grad.t(), aligned(x), offs=ends).masked_fill_(empty.view(-1, 1, 1), 0)
        return x_grad, weight_grad, None


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of it, contiguous and starting at a multiple of 16 bytes, as the kernel takes it."""
    x = x.contiguous()
    return x.clone() if x.storage_offset() % ALIGNED else x


class _GroupedProduct(torch.autograd.Function):
    """Keeps the weight, and x if the weight trains."""

    @staticmethod
    def forward(ctx, x, weight, counts):
        ctx.counts = counts
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _by_expert(x, weight.mT, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _by_expert(grad, weight, ctx.counts)
        if ctx.needs_input_grad[1]:
            weight_grad = torch.empty_like(weight)
            for expert_grad, rows, grads in zip(weight_grad, x.split(ctx.counts), grad.split(ctx.counts), strict=True):
                torch.mm(grads.t(), rows, out=expert_grad)  # 0 for no rows
        return x_grad, weight_grad, None


def _by_expert(x: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """Multiply each expert's rows by its matrix.

    On a CPU no row's result depends on where other rows go, in float32 to the last bit. Products of fewer rows than a
    block sum in another order, as do those of the rows after the last whole one in other dtypes; so products take whole
    blocks, if need be with rows of the next expert, whose results are dropped, or single rows, where experts have
    hardly one each.
    """
    y, dtype = x.new_empty(len(x), matrices.size(-1)), arithmetic(x.device, x.dtype)
    exact = x.device.type == "cpu"
    alone, block = exact and len(x) <= len(matrices), BLOCK if exact else 1
    starts = accumulate(counts, initial=0)
    for start, count, matrix in zip(starts, counts, matrices, strict=False):  # the last is where the rows end
        stop, taken = start + count, -(-count // block) * block
        if alone:
            for i in range(start, stop):
                _product(x[i : i + 1].to(dtype), matrix.to(dtype), y[i : i + 1])
        elif count:
            rows = x[start : start + taken]
            if len(rows) < taken:
                rows = F.pad(rows, (0, 0, 0, taken - len(rows)))
            _product(rows.to(dtype), matrix.to(dtype), y[start:stop])
    return y


def _product(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Write the product of as many of the rows as `out` has."""
    if len(rows) >= BLOCK and onednn_takes(rows, matrix):
        out.copy_(onednn_product(rows, matrix.t())[: len(out)])
    elif len(rows) == len(out) and rows.dtype == out.dtype:
        torch.mm(rows, matrix, out=out)
    else:
        out.copy_((rows @ matrix)[: len(out)])


class Experts(nn.Module):
    """A linear layer for each expert."""

    def __init__(self, n_expert: int, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.n_expert, self.in_features, self.out_features = n_expert, in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_expert, out_features, in_features))
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)  # as nn.Linear does
        self.bias = nn.Parameter(torch.zeros(n_expert, out_features)) if bias else None

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        """Apply each expert to its rows: x (rows, in_features), sorted by expert, to (rows, out_features)."""
        y = grouped_product(x, self.weight, routes.groups)
        return y if self.bias is None else y + routes.groups.rows_of(self.bias).to(y.dtype)


class Router(nn.Module):
    """Chooses each token's experts, and their weights. No nn.Linear, so that no method attaches to it."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_expert, self.n_expert_per_token = config.n_expert, config.n_expert_per_token
        self.sigmoid, self.norm_weights = config.router_score == "sigmoid", config.norm_expert_weights
        self.margin = config.router_margin if config.router_score == "sparsemixer" else None
        self.scale = config.expert_scale
        self.groups, self.groups_per_token = config.n_expert_group, config.n_group_per_token
        self.best_of_group = config.n_best_of_group
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.zeros(config.n_expert)) if config.router_bias else None
        self.norm = PlainRMSNorm(config.n_embd, config.norm_eps) if config.router_norm else None
        self.input_scale = nn.Parameter(torch.ones(config.n_embd)) if config.router_norm else None
        self.expert_scales = nn.Parameter(torch.ones(config.n_expert)) if config.router_norm else None
        # it balances the load, by another rule than gradients
        correction = torch.zeros(config.n_expert) if config.router_correction else None
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", correction)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Return the weights of each token's experts, float32 (N, k), and the routing of tokens (N, n_embd) to them."""
        if self.norm is not None and self.input_scale is not None:
            x = self.norm(x) * self.input_scale * x.size(-1) ** -0.5
        logits = F.linear(x, self.weight, self.bias)
        if self.margin is not None:
            weights, chosen = sparse_mixer(logits.float(), self.n_expert_per_token, self.margin)
            return weights * self.scale, Routing.from_topk(chosen, self.n_expert)
        scores = logits.float().sigmoid() if self.sigmoid else logits.softmax(-1, dtype=torch.float32)
        # sigmoids of large numbers are 1 alike, and would not tell which is the largest
        alone = self.sigmoid and self.groups == 1 and self.e_score_correction_bias is None
        chosen = (logits if alone else self.choice(scores)).topk(self.n_expert_per_token).indices
        weights = scores.gather(-1, chosen)
        if self.norm_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.expert_scales is not None:
            weights = weights * self.expert_scales[chosen]
        return weights * self.scale, Routing.from_topk(chosen, self.n_expert)

    def choice(self, scores: Tensor) -> Tensor:
        """Return the scores (N, n_expert) that choose: corrected, and none of experts outside of the best groups."""
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if self.groups == 1:
            return scores
        grouped = scores.unflatten(-1, (self.groups, -1))
        best = grouped.topk(self.best_of_group).values.sum(-1).topk(self.groups_per_token).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def sparse_mixer(logits: Tensor, k: int, margin: float) -> tuple[Tensor, Tensor]:
    """Choose the k likeliest experts, each weighed by a softmax over those near it, without those chosen before.

    Near is an expert whose logit is lower by no more than the margin, as a part of its own size or of the largest's
    (Liu et al. 2024, GRIN, arXiv 2409.12136, SparseMixer-v2).

    Args:
        logits: float32 (N, n_expert).

    Returns:
        Weights float32 (N, k), and the experts int64 (N, k).
    """
    weights, experts, left = [], [], logits
    for _ in range(k):
        most, best = left.detach().max(-1, keepdim=True)
        far = (most - logits) / logits.abs().clamp(min=most) > margin
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, best))
        experts.append(best)
        left = left.scatter(-1, best, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)


class SharedGate(nn.Module):
    """Says how much of the shared expert a token takes. No nn.Linear, so that no method attaches to it."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x, self.weight))
