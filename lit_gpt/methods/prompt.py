"""Learned prompts: prompt tuning, P-tuning and prefix tuning.

Every sequence begins with `GPT.virtual_tokens`, ids above those of the vocabulary. What stands for them is learned:

embeddings   their embeddings (Lester et al. 2021, arXiv 2104.08691); made by an encoder, P-tuning (Liu et al. 2021,
             arXiv 2103.10385)
keys_values  their keys and values in every layer (Li and Liang 2021, arXiv 2101.00190, prefix tuning)

To packing, caches and positions these tokens are like any others. A model that starts from the tokens of a text is at
first the base with that text before every sequence.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.errors import UsageError
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.hyperparameters import PromptConfig
from lit_gpt.methods.method import Method, Start, mark_trainable
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, Block


class Prompt(Method):
    """Trains vectors of virtual tokens before every sequence."""

    name = "prompt"
    config: PromptConfig

    @property
    def virtual_tokens(self) -> int:
        return self.config.length

    @property
    def unsharded(self) -> str | None:
        return f"--prompt_kind {self.config.kind}"

    def attach(self, model: GPT) -> GPT:
        """Put virtual tokens before the model's sequences, in place, and let only their vectors train.

        Raises:
            UsageError: a layer has no keys and values.
        """
        blocks, wanted = cast(Iterable[Block], model.h), self.config.kind == "keys_values"
        if wanted and (model.config.layers_differ or any(block.attn is None for block in blocks)):
            raise UsageError(
                f"--prompt_kind keys_values: {model.config.name} has layers without, or of other sizes than the rest; "
                "expected embeddings"
            )
        made = Made()
        for layer, block in enumerate(blocks):
            if wanted and block.attn is not None:
                block.attn.virtual = VirtualKeysValues(made, layer, block.attn.head_size)
        model.set_submodule("wte", VirtualEmbedding(model.wte, model.config, self.config, made))
        model.virtual_tokens = self.virtual_ids(model.config)
        mark_trainable(model)
        return model

    @torch.no_grad()
    def initialize(self, model: GPT, start: Start | None = None) -> None:
        vectors = prompt_of(model).vectors
        if self.config.start == "random":  # as torch's embeddings are drawn; of embeddings, in the size of the base's
            plain = self.config.encoder == "none" and self.config.kind == "embeddings"
            vectors.normal_(std=float(embedded(model, some_tokens(model, 256)).std()) if plain else 1.0)
            return
        ids = some_tokens(model, len(vectors))
        if self.config.start == "text":
            own = start.encode(self.config.text or "") if start else []
            if not own:
                raise UsageError("--prompt_text: holds no tokens; give some text")
            ids = torch.tensor([own[i % len(own)] for i in range(len(vectors))], device=vectors.device)
        keys_values = self.config.kind == "keys_values"
        vectors.copy_(self.keys_values(model, ids) if keys_values else embedded(model, ids))

    def keys_values(self, model: GPT, ids: Tensor) -> Tensor:
        """Return what every layer has for these tokens, (len(ids), sizes of `sizes_of`)."""
        cache, training = model.kv_cache(1, len(ids)), model.training
        model.eval().hidden(ids.unsqueeze(0), cache=cache)
        model.train(training)
        tensors = [tensor for layer in cache for tensor in layer.keys_values]
        return torch.cat([tensor[0].transpose(0, 1).flatten(1) for tensor in tensors], dim=1).float()


def some_tokens(model: GPT, n: int) -> Tensor:
    """Return n random tokens of the vocabulary, int64 (n,)."""
    return torch.randint(model.config.vocab_size, (n,)).to(model.wte.weight.device)


def embedded(model: GPT, ids: Tensor) -> Tensor:
    """Return the base's embeddings of tokens, float32 (len(ids), n_embd)."""
    return cast(VirtualEmbedding, model.get_submodule("wte")).embedding(ids).float()


def prompt_of(model: GPT) -> "SoftPrompt":
    """Return the vectors of a model that this method is attached to."""
    return cast(VirtualEmbedding, model.get_submodule("wte")).prompt


class Made:
    """Holds what the embedding has made of the row that the model computes, for the layers above it.

    Attributes:
        virtual: bool (B, T), where virtual tokens are.
        which: int64 (B, T), which of them.
        vectors: what `SoftPrompt` gives.
    """

    virtual: Tensor
    which: Tensor
    vectors: Tensor


class LSTM(nn.LSTM):
    """torch's, which also knows its weights after others have been put in their place."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the state is of no use
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        return super().forward(x)[0]


class SoftPrompt(nn.Module):
    """Holds the vectors that train, and what encodes them, in float32.

    The encoders are those of the papers: of embeddings an MLP of three layers, or a bidirectional LSTM of two layers
    and an MLP of two; of keys and values an MLP of two layers.
    """

    def __init__(self, size: int, out: int, config: PromptConfig, device: torch.device) -> None:
        super().__init__()
        hidden, encoded = config.hidden or size, config.encoder != "none"
        place: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.vectors = nn.Parameter(torch.randn(config.length, size if encoded else out, **place))
        inner = [nn.Linear(hidden, hidden, **place), nn.ReLU()] if config.kind == "embeddings" else []
        activation = nn.ReLU() if config.kind == "embeddings" else nn.Tanh()
        layers: list[nn.Module] = []
        if config.encoder == "mlp":
            layers = [nn.Linear(size, hidden, **place), activation, *inner, nn.Linear(hidden, out, **place)]
        elif config.encoder == "lstm":
            lstm = LSTM(size, hidden, num_layers=2, bidirectional=True, batch_first=True, **place)
            wide = nn.Linear(2 * hidden, 2 * hidden, **place)
            layers = [lstm, wide, activation, nn.Linear(2 * hidden, out, **place)]
        self.encoder = nn.Sequential(*layers)
        self.trained_parameters = tuple(name for name, _ in self.named_parameters())

    def forward(self) -> Tensor:
        """Return a vector for each virtual token, float32 (length, out)."""
        device = self.vectors.device.type
        with torch.autocast(device, enabled=False):
            return self.encoder(self.vectors.unsqueeze(0))[0]


class VirtualEmbedding(nn.Module):
    """Takes the place of the embedding, and has the vectors of virtual tokens too."""

    def __init__(self, embedding: nn.Module, model: Config, config: PromptConfig, made: Made) -> None:
        super().__init__()
        self.embedding, self.vocabulary, self.made = embedding, model.padded_vocab_size, made
        self.embeds = config.kind == "embeddings"
        out = model.n_embd if self.embeds else model.n_layer * sum(model.qkv_sizes[1:])
        self.prompt = SoftPrompt(model.n_embd, out, config, next(embedding.parameters()).device)

    @property
    def weight(self) -> Tensor:
        """Return the base's embeddings."""
        return cast(nn.Embedding, self.embedding).weight

    def forward(self, idx: Tensor) -> Tensor:
        """Return embeddings (B, T, n_embd); where keys and values are learned, those of virtual tokens are not used."""
        made, virtual = self.made, idx >= self.vocabulary
        made.virtual, made.which = virtual, (idx - self.vocabulary).clamp(min=0)
        made.vectors = self.prompt()
        x = self.embedding(idx.masked_fill(virtual, 0))
        if not self.embeds:
            return x
        return torch.where(virtual.unsqueeze(-1), F.embedding(made.which, made.vectors).to(x.dtype), x)

    def record(self, tape: DecodingTape, x: Tensor, factor: float, by_position: bool, skipped: int) -> None:
        """Add the embedding to a decoding tape: a prompt is read before, so that no virtual token is decoded."""
        tape.embed(x, self.embedding, factor, by_position, skipped)


class VirtualKeysValues(nn.Module):
    """Puts the learned keys and values of virtual tokens in the place of those that attention has computed.

    They are as a cache keeps them: normed and rotated.
    """

    def __init__(self, made: Made, layer: int, head_size: int) -> None:
        super().__init__()
        self.made, self.layer, self.head_size = made, layer, head_size

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, n_query_groups, T, head_size)."""
        sizes = [x.size(1) * self.head_size for x in (k, v)]
        start, made = self.layer * sum(sizes), self.made
        own = F.embedding(made.which, made.vectors[:, start : start + sum(sizes)]).to(k.device).split(sizes, dim=-1)
        own = tuple(x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in own)
        at = made.virtual[:, None, :, None].to(k.device)
        learned = [torch.where(at, mine.to(x.dtype), x) for mine, x in zip(own, (k, v), strict=True)]
        return learned[0], learned[1]
