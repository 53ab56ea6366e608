"""Attaches LoRA to a model: which layers, and which rows of them, get an update."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lit_gpt.checkpoints import io
from lit_gpt.errors import UsageError, UserError
from lit_gpt.hardware import on_meta
from lit_gpt.methods import finetuned_file
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.lora.factors import Parts, SharedFactors
from lit_gpt.methods.lora.glora import GLoRALinear
from lit_gpt.methods.lora.layers import LoRAExperts, LoRALayer, LoRALinear, lora_layers
from lit_gpt.methods.method import experts_of, mark_trainable
from lit_gpt.methods.parts import train_parts
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.moe import Experts

Target = tuple[str, nn.Module, Parts]  # path of a layer, the layer, and the rows of its adapted projections


def attach(model: GPT, config: LoRAConfig) -> GPT:
    """Wrap the chosen projections of `model`, in place, and let only the updates train.

    What starts from the base's weights gets its start from `starts.initialize`.

    Raises:
        UsageError: the form of the updates does not go with some layer.
    """
    check_head(config, model.config)
    train_parts(model, config.parts)
    wanted = with_ranks([(path, model.get_submodule(path), parts) for path, parts in targets(model, config)], config)
    check_layers(wanted, config, model.config)
    kind_of = kinds(wanted, config)
    shared = shared_factors(wanted, config, kind_of)
    if shared:
        model.lora_shared = nn.ModuleDict(shared)
    for path, layer, parts in wanted:
        plain = GLoRALinear if config.update == "glora" else LoRALinear
        wrapper = LoRAExperts if experts_of(layer) else plain
        own = config.of_layer(path)
        model.set_submodule(path, wrapper(layer, parts, own, shared.get(kind_of[path]), model.noise))
    mark_trainable(model)
    return model


def check_head(config: LoRAConfig, base: Config) -> None:
    """Refuse to adapt a head whose weight trains itself."""
    parts = config.parts
    if config.head and (parts.embeddings == "both" or parts.embeddings == "input" and base.tie_embeddings):
        raise UsageError(
            f"--train_embeddings {parts.embeddings} with --lora_head true: the head's weight trains itself; leave one "
            "of them out"
        )


def with_ranks(wanted: list[Target], config: LoRAConfig) -> list[Target]:
    """Return those layers that `--lora_ranks` gives a rank above 0.

    Raises:
        UsageError: a pattern matches no layer, or there are none left.
    """
    for pattern in config.ranks:
        if not any(re.search(pattern, path) for path, _, _ in wanted):
            raise UsageError(f"--lora_ranks: '{pattern}' matches no adapted layer; they are named as {wanted[0][0]}")
    left = [target for target in wanted if config.of_layer(target[0]).r]
    if wanted and not left:
        raise UsageError("--lora_ranks: no layer keeps a rank above 0: nothing would be trained")
    return left


def check_layers(wanted: list[Target], config: LoRAConfig, base: Config) -> None:
    """Refuse layers for which the form or the start of the updates does not exist, and ranks beyond those of all."""
    most = 0
    for path, layer, parts in wanted:
        r = config.of_layer(path).r
        if config.update in ("dora", "glora") and experts_of(layer):
            raise UsageError(
                f"--lora_update {config.update}: {base.name} has experts in {path}; leave out --lora_mlp true"
            )
        sizes = cast(Experts, layer)  # for mypy
        if config.init == "eva" and (experts_of(layer) or r > sizes.in_features):
            what = "has experts" if experts_of(layer) else f"has only {sizes.in_features} inputs"
            raise UsageError(f"--lora_init eva: {path} of {base.name} {what}; leave it out, or give another start")
        limit = min(sizes.in_features, *(stop - start for start, stop in parts))
        most = max(most, limit)
        if config.changes_start and r > limit:
            raise UsageError(
                f"--lora_init {config.init}: {path} has only rank {limit}; expected --lora_r of at most that"
            )
    largest = max((config.of_layer(path).r for path, _, _ in wanted), default=0)
    if config.update != "vera" and largest > most:  # VeRA's matrices are random, and larger ones are of use
        flag = f"--lora_r {config.r}" if largest == config.r else f"--lora_ranks: {largest}"
        raise UsageError(f"{flag}: no adapted layer has a rank above {most}; expected at most that")


def kinds(wanted: list[Target], config: LoRAConfig) -> dict[str, str]:
    """Return the name of the matrices that each layer shares with others, by the layers' paths.

    Of vera's all layers share theirs; else those with the same path within a block, the same sizes and as many parts
    do. Of several sizes, such as those of an MLP before blocks of experts, the first has the plain name.
    """
    names: dict[str, str] = {}
    first: dict[str, tuple[str, int]] = {}
    for path, layer, parts in wanted:
        name, inputs = re.sub(r"^h\.\d+\.", "", path).replace(".", "_"), cast(Experts, layer).in_features
        sizes = "x".join(map(str, (*experts_of(layer), sum(stop - start for start, stop in parts), inputs)))
        own, plain = (sizes, len(parts)), first.setdefault(name, (sizes, len(parts)))
        names[path] = name if own == plain else f"{name}_{sizes}" + (f"_{len(parts)}" if own[1] != plain[1] else "")
    return dict.fromkeys(names, "all") if config.update == "vera" else names


def shared_factors(wanted: list[Target], config: LoRAConfig, kinds: dict[str, str]) -> dict[str, SharedFactors]:
    """Return the matrices that layers share, by their kind: vera's, of the largest sizes, are of all layers."""
    if config.update not in ("vera", "tied"):
        return {}
    device = next(wanted[0][1].parameters()).device
    if config.update == "vera":
        inputs = max(cast(Experts, layer).in_features for _, layer, _ in wanted)
        rows = max(stop - start for _, _, parts in wanted for start, stop in parts)
        return {"all": SharedFactors((config.r, inputs), (rows, config.r), config, device)}
    shared = {}
    for path, layer, parts in wanted:
        kind = kinds[path]
        if kind not in shared and path.startswith("h."):  # the head is the only one of its kind
            A = (*experts_of(layer), len(parts) * config.r, cast(Experts, layer).in_features)
            B = (*experts_of(layer), sum(stop - start for start, stop in parts), config.r)
            shared[kind] = SharedFactors(A, B, config, device)
    return shared


def targets(model: GPT, config: LoRAConfig) -> Iterator[tuple[str, Parts]]:
    """Yield the path of each linear layer to adapt, and the rows (start, stop) of its adapted projections."""
    n = model.config.n_embd
    for layer, block in enumerate(cast(Iterable[Block], model.h)):
        for name, mixer in block.token_mixers.items():
            projections = mixer.projections.items()
            if qkv := sorted(span for part, spans in projections if getattr(config, part) for span in spans):
                yield f"h.{layer}.{name}.qkv", qkv
            for further, made in mixer.further.items():
                if any(getattr(config, part) for part in made):
                    yield f"h.{layer}.{name}.{further}", [(0, getattr(mixer, further).out_features)]
            if config.projection:
                yield f"h.{layer}.{name}.proj", [(0, n)]
        if config.mlp and block.mlp is not None:
            yield from ((f"h.{layer}.mlp.{path}", parts) for path, parts in mlp_targets(block.mlp))
    if config.head:
        yield "lm_head", [(0, model.config.padded_vocab_size)]


def mlp_targets(mlp: nn.Module) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yield what `targets` does of an MLP, of routed and shared experts.

    Gate and up have an update each; which experts a token goes to stays the base's choice.
    """
    for path, layer in mlp.named_modules():
        name, n = path.rpartition(".")[2], getattr(layer, "out_features", 0)
        if name == "gate_up":
            yield path, [(0, n // 2), (n // 2, n)]
        elif name in ("fc", "proj"):
            yield path, [(0, n)]


def skeleton(base: Config, config: LoRAConfig) -> GPT:
    """Return a base with LoRA attached, both without contents."""
    with on_meta():
        return attach(GPT(base), config)


def load_layers(model: GPT, state: Mapping[str, Tensor], source: Path | str) -> dict[str, LoRALayer]:
    """Return the layers of a skeleton by their paths, with the tensors of a finetuned file in them.

    Raises:
        UserError: the tensors contradict the configuration, the update is not a product of two matrices, or the file
            holds parts of the base that were trained, too.
    """
    layers = lora_layers(model)
    for flag in next(iter(layers.values())).config.parts.flags:
        raise UserError(f"{source}: trained with {flag}, which changes the base itself; merge it instead")
    update = next(iter(layers.values())).config.update
    if update in ("dora", "glora"):
        what = "whole rows of the base" if update == "dora" else "the base's weights"
        raise UserError(f"{source}: trained with lora_update {update}, which scales {what}; merge it instead")
    io.check_state(finetuned_file.file_parameters(model), state, source)
    model.load_state_dict(state, strict=False, assign=True)
    return layers


@torch.no_grad()
def updates(model: GPT, state: Mapping[str, Tensor], source: Path | str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the path of each layer of a base that a finetuned file adapts, and A and B, so that B A is its update.

    A is (len(parts) * rank, in_features), and B (out_features, len(parts) * rank) with the scale in it and zeros where
    a part's rows and another's columns meet; before them is the number of experts, in a layer of experts.

    Args:
        model: the file's skeleton, which may serve several files.

    Raises:
        UserError: as `load_layers`.
    """
    for path, layer in load_layers(model, state, source).items():
        A, rank = layer.factors()[0], layer.rank
        B = A.new_zeros(*layer.experts, layer.out_features, len(layer.parts) * rank)
        for i, ((start, stop), _, part) in enumerate(layer.pairs()):
            B[..., start:stop, i * rank : (i + 1) * rank] = part * layer.scale
        yield path, A, B
