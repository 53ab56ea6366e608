"""The matrices of LoRA's updates: what of them trains, and how A and B are made of it.

plain   s B A, A random and B zero at first (Hu et al. 2021, arXiv 2106.09685)
dora    the same, and each row of W + s B A gets a length that trains (Liu et al. 2024, arXiv 2402.09353)
vera    diag(b) B diag(d) A, one random A and B for all layers; d and b train (Kopiczko et al. 2023, arXiv 2310.11454)
tied    s diag(v) B diag(u) A, with one A and B for the layers of a kind; all train (Renduchintala et al. 2023,
        arXiv 2311.09578)
qa      s B A P, where P sums the inputs of each group of 64 that int4 has a zero point for (Xu et al. 2023, arXiv
        2309.14717): the update is a shift of these zero points
multi   s (diag(g_1) B_1 A_1 + ... + diag(g_n) B_n A_n), g zero at first (Wang et al. 2023, arXiv 2311.11501)
glora   W + s W * (D C) + s B A, and of a bias b + b * d + e + W c (Chavan et al. 2023, arXiv 2306.07967); D, d, e and c
        are zero at first, see lit_gpt.methods.lora.glora

Whatever the form, but for the last, an update is a product of two matrices: `factors` gives them, and products,
merging, export and decoding go by these alone.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_gpt.kernels import linear
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.method import LinearWrapper
from lit_gpt.model.noise import Noise, row_keys
from lit_gpt.quantization.modules import QuantizedLinear, weight_of
from lit_gpt.quantization.packing import GROUP

Parts = list[tuple[int, int]]
OWN = (  # the parameters that some update or start has besides A and B
    "gate", "rank_scale", "row_scale", "magnitude", "start_A", "start_B", "scale_A", "scale_B", "bias_scale",
    "bias_shift", "bias_mix",
)  # fmt: skip
VERA_START = 0.1  # of d (section 4 of the paper)


class SharedFactors(nn.Module):
    """Holds an A and a B in float32 that several layers share."""

    def __init__(self, A: tuple[int, ...], B: tuple[int, ...], config: LoRAConfig, device: torch.device) -> None:
        super().__init__()
        self.lora_A, self.lora_B = (nn.Parameter(torch.zeros(s, device=device, dtype=torch.float32)) for s in (A, B))
        draw(self.lora_A, config)
        if config.update == "vera":
            draw(self.lora_B, config)
            self.kept_parameters: tuple[str, ...] = ("lora_A", "lora_B")
        else:
            self.trained_parameters, self.kept_parameters = trained_and_kept(config)


def draw(A: Tensor, config: LoRAConfig) -> None:
    """Fill a matrix (..., size), of which there may be several, with its random start, in place."""
    rows = A.detach().flatten(0, -2)
    if config.init == "gaussian":
        nn.init.normal_(rows, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5))


def trained_and_kept(config: LoRAConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which of A and B train, and which do not but belong in the finetuned file."""
    return (("lora_B",), ("lora_A",)) if config.train == "B" else (("lora_A", "lora_B"), ())


class Factors(LinearWrapper):
    """Holds what the updates of some rows of a layer are made of, in float32.

    Args:
        linear: the base, a module from (..., in_features) to (..., out_features).
        parts: (start, stop) of the rows of each projection within the layer that is adapted; each has its own A and B,
            while the product with all A's is one.
        shared: holds the A and B of several layers, where the update is made of such.
        noise: the model's, which hands out the keys by which inputs are dropped in training.
    """

    lora_A: nn.Parameter  # absent where they are shared
    lora_B: nn.Parameter
    # None unless the update or its start has them
    gate: nn.Parameter | None  # multi: g
    rank_scale: nn.Parameter | None  # vera, tied: d or u
    row_scale: nn.Parameter | None  # vera, tied: b or v
    magnitude: nn.Parameter | None  # dora: the rows' lengths
    start_A: nn.Parameter | None  # what A and B were at first, to be subtracted; see lit_gpt.methods.lora.starts
    start_B: nn.Parameter | None
    scale_A: nn.Parameter | None  # glora: C and D, and of the bias d, e and c
    scale_B: nn.Parameter | None
    bias_scale: nn.Parameter | None
    bias_shift: nn.Parameter | None
    bias_mix: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Module,
        parts: Parts,
        config: LoRAConfig,
        shared: SharedFactors | None = None,
        noise: Noise | None = None,
    ) -> None:
        super().__init__(linear)
        self.keys: Tensor | None = None
        if noise and config.dropout:
            noise.layers.append(self)
        self.parts, self.r, self.dropout, self.scale = parts, config.r, config.dropout, config.scale
        self.config, self.sizes = config, [stop - start for start, stop in parts]
        self.shared: tuple[SharedFactors, ...] = (shared,) if shared else ()  # a tuple: it belongs to the model
        self.copies = config.copies if config.update == "multi" else 1
        self.squares: Tensor | None = None  # of the base's rows, once they are wanted
        trained: tuple[str, ...] = ()
        kept: tuple[str, ...] = ()
        if not shared:
            trained, kept = trained_and_kept(config)
            shapes = self.shapes(self.copies * self.r)
            self.lora_A, self.lora_B = (self.new(shape) for shape in shapes)
            draw(self.lora_A, config)
        own = self.own_parameters()
        for name in OWN:
            self.register_parameter(name, own.get(name))
        frozen = tuple(name for name in own if name.startswith("start"))
        self.trained_parameters = (*trained, *(name for name in own if name not in frozen))
        self.kept_parameters = (*kept, *frozen)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for so many ranks of each part; qa's A has a column for each group of inputs."""
        inputs = -(-self.in_features // GROUP) if self.config.update == "qa" else self.in_features
        return (*self.experts, len(self.parts) * rank, inputs), (*self.experts, sum(self.sizes), rank)

    def new(self, shape: tuple[int, ...], value: float = 0.0) -> nn.Parameter:
        device = next(self.linear.parameters()).device
        return nn.Parameter(torch.full(shape, value, device=device, dtype=torch.float32))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the layer has besides A and B."""
        update, shapes, own = self.config.update, self.shapes(self.r), dict[str, nn.Parameter]()
        ranks, rows = (shape[-2] for shape in shapes)
        if update == "multi":
            own["gate"] = self.new((*self.experts, rows, self.copies))
            bound = self.r**-0.5  # kaiming, of each copy by itself
            nn.init.uniform_(self.lora_B.detach(), -bound, bound)
        elif update in ("vera", "tied"):
            own["rank_scale"] = self.new((*self.experts, ranks), VERA_START if update == "vera" else 1.0)
            own["row_scale"] = self.new((*self.experts, rows), 0.0 if update == "vera" else 1.0)
        elif update == "dora":
            own["magnitude"] = self.new((rows,))
        elif update == "glora":
            own["scale_A"], own["scale_B"] = (self.new(shape) for shape in shapes)
            draw(own["scale_A"], self.config)
            if getattr(self.linear, "bias", None) is not None:
                own["bias_scale"], own["bias_shift"] = self.new((rows,)), self.new((rows,))
                own["bias_mix"] = self.new((len(self.parts), self.in_features))
        if self.config.changes_start:
            own["start_A"], own["start_B"] = (self.new(shape) for shape in shapes)
        return own

    @property
    def rank(self) -> int:
        """Return the ranks that each part has in `factors`."""
        return self.r * (2 if self.start_A is not None else self.copies)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of all parts, through which what trains gets its gradients. The scale is not in them.

        Returns:
            A (len(parts) * rank, in_features): an A for each part, one below the other; B (sum(sizes), rank) likewise.
            Before these is the number of experts, in a layer of experts.
        """
        A, B = self.shared_factors() if self.shared else (self.lora_A, self.lora_B)
        if self.gate is not None:
            B = (B.unflatten(-1, (self.copies, self.r)) * self.gate.unsqueeze(-1)).flatten(-2)
        if self.config.update == "qa":
            A = A.repeat_interleave(GROUP, dim=-1)[..., : self.in_features]
        if self.rank_scale is not None and self.row_scale is not None:
            A, B = self.rank_scale.unsqueeze(-1) * A, self.row_scale.unsqueeze(-1) * B
        if self.start_A is not None and self.start_B is not None:
            both = (x.unflatten(-2, (len(self.parts), self.r)) for x in (A, self.start_A))
            A, B = torch.cat(tuple(both), dim=-2).flatten(-3, -2), torch.cat((B, -self.start_B), dim=-1)
        return A, B

    def shared_factors(self) -> tuple[Tensor, Tensor]:
        """Return the shared A and B in the shapes of this layer: of vera's, the corners that it is large enough for."""
        assert self.rank_scale is not None
        device = self.rank_scale.device  # of several, where this layer lies
        A, B = (x.to(device) for x in (self.shared[0].lora_A, self.shared[0].lora_B))
        if self.config.update == "vera":
            A, B = A[:, : self.in_features].repeat(len(self.parts), 1), torch.cat([B[:size] for size in self.sizes])
        return A, B

    def pairs(self) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """Yield for each part its rows (start, stop), its A (..., rank, in_features) and B (..., rows, rank)."""
        A, B = self.factors()
        return zip(self.parts, A.split(self.rank, dim=-2), B.split(self.sizes, dim=-2), strict=True)

    def by_part(self, of_all: Tensor) -> Tensor:
        """Return what there is for each row of the layer (..., out_features) for the adapted ones (..., sum(sizes))."""
        return torch.cat([of_all[..., start:stop] for start, stop in self.parts], dim=-1)

    def dropout_keys(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return by what inputs are dropped, int64 (tokens,), or None where none are."""
        return row_keys(self.keys, tokens, device) if self.training and self.dropout else None

    # DoRA: the lengths of rows

    def output_scale(self, A: Tensor, B: Tensor) -> Tensor | None:
        """Return what the layer's output is multiplied by, float32 (out_features,), or None where it is not.

        A row's factor is its magnitude over its length, which gets no gradient (section 4.3 of the paper); 1 where the
        row is not adapted.
        """
        if self.magnitude is None:
            return None
        factors, pieces, at = self.magnitude / self.lengths(A, B), list[Tensor](), 0
        for (start, stop), part in zip(self.parts, factors.split(self.sizes), strict=True):
            pieces += [part.new_ones(start - at), part]
            at = stop
        return torch.cat([*pieces, factors.new_ones(self.out_features - at)])

    @torch.no_grad()
    def lengths(self, A: Tensor, B: Tensor) -> Tensor:
        """Return the norms of the adapted rows of W + scale * B A, float32 (sum(sizes),).

        The update is never made: ||w + s b A||^2 = ||w||^2 + 2 s b (w A^T) + s^2 b (A A^T) b.
        """
        weight = self.base_weight()
        if self.squares is None:
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
            self.squares = self.by_part(squares)  # the base does not change
        lengths = []
        halves = zip(self.parts, A.split(self.rank), B.split(self.sizes), self.squares.split(self.sizes), strict=True)
        for (start, stop), a, b, squares in halves:
            across = linear.linear(a.to(weight.dtype), weight[start:stop]).float().t()  # (rows, rank)
            both = 2 * self.scale * across + self.scale**2 * (b @ (a @ a.t()))
            lengths.append((squares + (both * b).sum(1)).clamp(min=0).sqrt())
        return torch.cat(lengths)

    def base_weight(self) -> Tensor:
        """Return the base's weight as the layer computes with it."""
        if isinstance(self.linear, QuantizedLinear):
            floating = (p for p in self.linear.parameters() if p.is_floating_point())
            return self.linear.dequantize(next(floating).dtype)
        return weight_of(self.linear)
