"""Parts of the base that train themselves: norms, embeddings and the head beside what a method attaches, and biases.

BitFit (Ben Zaken et al. 2022, arXiv 2106.10199) trains biases alone. LongLoRA (Chen et al. 2023, arXiv 2309.12307)
trains norms and embeddings beside LoRA.

What trains is kept in float32 and cast to the dtype that the base is computed in; of a bias the change is kept. So a
freshly attached model gives exactly the base's logits.
"""

from collections.abc import Set
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_gpt.errors import UsageError
from lit_gpt.kernels import linear
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.hyperparameters import BitFitConfig, PartsConfig
from lit_gpt.methods.method import LinearWrapper, Method, mark_trainable
from lit_gpt.model.gpt import GPT
from lit_gpt.model.linear import Linear
from lit_gpt.model.moe import Experts, Routing
from lit_gpt.model.norms import RMSNorm
from lit_gpt.quantization.modules import QuantizedLinear, weight_of


class BitFit(Method):
    """Trains all biases of the base, those of norms included, and what of it `--train_...` names."""

    name = "bitfit"
    merges = True
    config: BitFitConfig

    def attach(self, model: GPT) -> GPT:
        """Let the biases train, in place.

        Raises:
            UsageError: the model has none, and nothing else is to train.
        """
        model.requires_grad_(False)
        train_parts(model, self.config.parts)
        train_biases(model)
        mark_trainable(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(
                f"--checkpoint_dir: {model.config.name} has no biases; give --train_norms true, or use finetune/lora.py"
            )
        return model

    @property
    def unsharded(self) -> str | None:
        return self.config.parts.unsharded

    def merge(self, model: GPT) -> GPT:
        for path, module in list(model.named_modules()):
            if isinstance(module, AddedBias | AddedExpertBias):
                module.linear.bias = nn.Parameter(module.merged_parameter("bias").to(model.dtype), requires_grad=False)
                model.set_submodule(path, module.linear)
        return settle(model)


class TrainedPart(nn.Module):
    """Takes the place of a part of the base that trains: kept in float32, and cast as it is used.

    Args:
        names: of the parameters that train.
        tied: what is this part's weight, and is another's too, which trains it.

    Attributes:
        inner: the name under which the part itself is found here.
        dtype: in which the base has it.
    """

    inner: ClassVar[str]

    def __init__(self, part: nn.Module, names: Set[str], tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.dtype = next((p.dtype for p in part.parameters()), torch.float32)
        for name, parameter in list(part.named_parameters()):
            if name == "weight" and tied is not None:
                part.weight = tied
            else:  # a copy: the base's own tensor may be mapped, and serve others
                setattr(part, name, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
        self.set_submodule(self.inner, part)
        self.trained_parameters = tuple(f"{self.inner}.{name}" for name, _ in part.named_parameters() if name in names)

    @property
    def part(self) -> nn.Module:
        return self.get_submodule(self.inner)

    def merged_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter as it was trained, float32."""
        return self.part.get_parameter(name).detach()

    @torch.no_grad()
    def settled(self) -> nn.Module:
        """Return the part alone, with what was trained in the base's dtype."""
        for name, parameter in list(self.part.named_parameters()):
            setattr(self.part, name, nn.Parameter(parameter.to(self.dtype), requires_grad=False))
        return self.part


class TrainedNorm(TrainedPart):
    """A norm whose parameters of these names train."""

    inner = "norm"
    norm: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.norm, {name: p.to(x.dtype) for name, p in self.norm.named_parameters()}, x)

    def record(self, tape: DecodingTape, x: Tensor, name: str | None, parts: int) -> Tensor:
        """Add the norm to a decoding tape."""
        return tape.norm(self.norm, x, name, parts)


class TrainedEmbedding(TrainedPart):
    """An embedding that trains; what it gives has the base's dtype."""

    inner = "embedding"
    embedding: nn.Embedding

    @property
    def weight(self) -> nn.Parameter:
        return self.embedding.get_parameter("weight")

    def forward(self, idx: Tensor) -> Tensor:
        """Return embeddings (..., n_embd) of int64 ids."""
        return self.embedding(idx).to(self.dtype)

    def record(self, tape: DecodingTape, x: Tensor, factor: float, by_position: bool, skipped: int) -> None:
        """Add the embedding to a decoding tape."""
        tape.embed(x, self.embedding, factor, by_position, skipped)


class TrainedHead(TrainedPart):
    """The output head, whose weight trains, or is the embedding's that does."""

    inner = "linear"
    linear: Linear

    def __init__(self, head: Linear, tied: nn.Parameter | None) -> None:
        super().__init__(head, {"weight"} if tied is None else set(), tied)
        self.in_features, self.out_features = head.in_features, head.out_features

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.get_parameter("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear.linear(x, self.weight.to(x.dtype), bias)

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the head to a decoding tape, in the base's dtype, in which it is read faster."""
        head = Linear(self.in_features, self.out_features, bias=False, device="meta")
        head.weight = nn.Parameter(self.weight.to(self.dtype), requires_grad=False)
        head.register_parameter("bias", self.bias)
        return tape.linear(head, x, name)


class Bias(LinearWrapper):
    """Holds the change of a layer's bias in float32: (out_features,), or (n_expert, out_features)."""

    trained_parameters = ("bias",)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        shape, device = (*self.experts, self.out_features), next(layer.parameters()).device
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))

    def merged_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the layer's weight as it is, or its bias with the change in it, float32."""
        if name == "weight":
            return weight_of(self.linear)
        return self.linear.get_parameter(name).detach().float() + self.bias.detach()


class AddedBias(Bias):
    """A linear layer whose bias trains."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.bias.to(y.dtype)

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        y = tape.linear(self.linear, x, name)
        tape.scale(y, torch.ones_like(self.bias), self.bias.detach())
        return y


class AddedExpertBias(Bias):
    """A layer of experts, each of whose biases trains."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        y = self.linear(x, routes)
        return y + routes.groups.rows_of(self.bias).to(y.dtype)


def train_parts(model: GPT, parts: PartsConfig) -> None:
    """Let the named parts of a base train, in place, before a method is attached to it.

    Raises:
        UsageError: the model has no such part, or has it quantized.
    """
    if parts.norms:
        train_norms(model, {"weight", "bias"})
    if parts.embeddings != "none":
        train_embeddings(model, parts.embeddings == "both")


def train_norms(model: GPT, names: Set[str]) -> None:
    """Let these parameters of all norms train."""
    found = {path: norm for path, norm in model.named_modules() if isinstance(norm, nn.LayerNorm | RMSNorm)}
    found = {path: norm for path, norm in found.items() if names & dict(norm.named_parameters()).keys()}
    if not found and "weight" in names:
        raise UsageError(f"--train_norms true: the norms of {model.config.name} have no weights; leave it out")
    for path, norm in found.items():
        model.set_submodule(path, TrainedNorm(norm, names))


def train_embeddings(model: GPT, head: bool) -> None:
    """Let the embeddings of tokens and of learned positions train, and with `head` the output head.

    A head that is tied to the embedding follows it.
    """
    for name in ("wte", "wpe"):
        embedding = getattr(model, name)
        if isinstance(embedding, nn.Embedding):
            model.set_submodule(name, TrainedEmbedding(embedding, {"weight"}))
        elif embedding is not None:
            raise UsageError("--train_embeddings: those of a quantized base cannot train; leave one of both out")
    tied = model.wte.get_parameter("weight") if model.config.tie_embeddings else None
    if head or tied is not None:
        model.set_submodule("lm_head", TrainedHead(model.lm_head, tied))


def train_biases(model: GPT) -> None:
    """Let the biases of all linear layers, experts and norms train. Routers stay as they are."""
    if not any(isinstance(module, TrainedNorm) for module in model.modules()):
        train_norms(model, {"bias"})
    kinds = nn.Linear | QuantizedLinear | Experts | TrainedHead
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, kinds)}
    within = {f"{path}.linear" for path, layer in layers.items() if isinstance(layer, TrainedHead)}
    for path, layer in layers.items():
        if layer.bias is not None and path not in within:
            model.set_submodule(path, (AddedExpertBias if isinstance(layer, Experts) else AddedBias)(layer))


def trained_parameters(model: GPT) -> dict[str, Tensor]:
    """Return what trained of the parts, in the base's dtype and under its names."""
    parts = ((path, part) for path, part in model.named_modules() if isinstance(part, TrainedPart))
    return {
        f"{path}.{name}": part.merged_parameter(name).to(part.dtype)
        for path, part in parts
        for name, _ in part.part.named_parameters()
    }


def settle(model: GPT) -> GPT:
    """Put what trained in the place of the base's parts, in their dtype, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, TrainedPart):
            model.set_submodule(path, module.settled())
    model.tie_weights()
    return model
