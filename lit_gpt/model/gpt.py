"""The GPT: embedding, blocks of token mixer and MLP, head. One file for every family; Config chooses among its options.

Finetuning methods attach from outside: by wrapping linear layers, norms and the embedding, or as what an attention adds
to its output (`prefix`) and puts for keys and values (`virtual`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_gpt.errors import UsageError, UserError
from lit_gpt.kernels import functional
from lit_gpt.model.attention import CausalSelfAttention
from lit_gpt.model.config import Config
from lit_gpt.model.kv_cache import AnyCache, AnyDecodeCache, KVCache, LayerCache, PackedPrefillCache, sharing
from lit_gpt.model.linear import Linear
from lit_gpt.model.loss import log_probabilities, summed_cross_entropy
from lit_gpt.model.mixers.mixer import Mixer
from lit_gpt.model.mixers.parallel import ParallelMixer
from lit_gpt.model.mixers.registry import MIXERS
from lit_gpt.model.mlp import activation, make_mlp
from lit_gpt.model.noise import Noise, with_noise
from lit_gpt.model.norms import Residual, add_and_norm, norm, residual_stream
from lit_gpt.model.packed_inputs import Segments, Targets
from lit_gpt.model.rope import RotaryEmbedding, Rotation
from lit_gpt.model.stream.altup import AltUp, Laurel, Streams
from lit_gpt.model.stream.layer_inputs import LayerInput, LayerInputs
from lit_gpt.quantization.modules import QuantizedEmbedding, QuantizedLinear


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        places = config.block_size + config.position_offset
        self.wpe = nn.Embedding(places, config.n_embd) if config.learned_positions else None
        self.ln_e = norm(config) if config.embedding_norm else nn.Identity()
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=config.head_bias)
        self.layer_inputs = LayerInputs(config) if config.layer_input_size else None
        self.streams = Streams(config) if config.n_stream > 1 else None
        self.rope = RotaryEmbedding(config.without_window)
        self.local_rope = self.rope
        if config.local_rope_base is not None:
            self.local_rope = RotaryEmbedding(replace(config, rope_base=config.local_rope_base, rope_scaling=None))
        self.noise = Noise()  # for what drops inputs in training
        self.noise_alpha = 0.0  # of the noise on embeddings in training, see lit_gpt.model.noise
        self.virtual_tokens: tuple[int, ...] = ()  # ids before every sequence, see lit_gpt.methods.prompt
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter, if the model ties them; repeat this after weights are assigned."""
        if self.config.tie_embeddings:
            for name, parameter in self.wte.named_parameters():  # several, if it is quantized
                setattr(self.lm_head, name, parameter)

    def forward(
        self,
        idx: Tensor,
        segments: Segments | None = None,
        cache: KVCache | list[AnyDecodeCache] | None = None,
        targets: Targets | None = None,
        last: bool = False,
    ) -> Tensor:
        """Return logits, or the loss if `targets` are given.

        Args:
            idx: token ids, int64 (B, T).
            segments: boundaries of the samples packed into the row; B must be 1. None: each row is one sequence.
            cache: what `kv_cache` made; `idx` follows the tokens in it and is added. Or a DecodeCache for each layer.
            targets: supervised positions. The logits of the others are never computed, nor all of them held at once.
            last: compute the logits of the last position alone.

        Returns:
            logits (B, T, padded_vocab_size), (B, 1, padded_vocab_size) with `last`; with `targets` their summed
            cross-entropy in nats, a float32 scalar.

        Raises:
            UserError: more tokens than the model has learned positions.
            ValueError: the cache is `needs_reread`.
        """
        x = self.hidden(idx, segments, cache)
        x = self.ln_f(x[:, -1:] if last else x)
        if targets is not None:
            at = targets.positions
            return summed_cross_entropy(
                self.lm_head,
                x.flatten(0, 1)[at],
                targets.labels,
                self.postprocess_logits,
                over=lambda rows: self.noise.over(at[rows]),
            )
        return self.postprocess_logits(self.lm_head(x))

    @torch.no_grad()
    def score(self, idx: Tensor, segments: Segments, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each target, float32 (n,), and whether it is the likeliest token, bool (n,)."""
        x = self.ln_f(self.hidden(idx, segments).flatten(0, 1)[targets.positions])
        return log_probabilities(self.lm_head, x, targets.labels, self.postprocess_logits)

    def hidden(
        self,
        idx: Tensor,
        segments: Segments | None = None,
        cache: KVCache | list[AnyDecodeCache] | list[PackedPrefillCache] | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Return the last block's output (B, T, n_embd), before norm and head; see `forward` for arguments and errors.

        Args:
            length: how long the sequence is about to become, which decides on its angles. None: it ends with `idx`.
        """
        first = cache[0] if cache else None
        if segments is not None:
            positions, lengths = segments.positions, segments.lengths
        elif isinstance(first, AnyDecodeCache):
            positions, lengths = first.positions.unsqueeze(1), first.lengths
        else:
            start = first.length if isinstance(first, LayerCache) else 0
            end = start + idx.size(1)
            length = length or end
            if isinstance(first, LayerCache):
                if self.needs_reread(first, length):
                    raise ValueError(f"with {length} tokens other angles hold: forget the cache and give all tokens")
                first.uses_long_rope = self.rope.is_long(length)
            positions, lengths = torch.arange(start, end, device=idx.device), (length,)
        if self.training and (self.noise.layers or self.noise_alpha):
            self.noise.begin(*tokens_of(idx, segments, positions))
        x = self.embed(idx, positions, lengths)  # (B, T, n_embd)
        inputs: Sequence[Tensor | None] = [None] * len(self.h)
        if self.layer_inputs is not None:
            inputs = self.layer_inputs(idx, x).unbind(2)
        caches: list[Any] = list(cache) if cache else [None] * len(self.h)
        if self.config.kv_layers:
            caches = sharing(caches, self.config.kv_layers)
        each = zip(self.h, self.rotations(positions, lengths, x.dtype), caches, inputs, strict=True)
        x = x if self.streams is None else self.streams.split(x)
        for block, rotation, kept, given in each:
            x = block(x, rotation, segments, kept, given)
        return x if self.streams is None else self.streams.join(x)

    def embed(self, idx: Tensor, positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return the hidden states before the first block, (B, T, n_embd)."""
        x, scale, limit = self.wte(idx), self.config.embedding_scale, self.config.block_size
        if scale != 1.0:
            x = x * torch.tensor(scale, dtype=x.dtype)  # rounded as the weights are, since the models were trained so
        if self.wpe is not None:
            if max(lengths) > limit:
                raise UserError(f"{max(lengths)} tokens exceed the model's {limit} learned positions; give it fewer")
            x = x + self.wpe(positions + self.config.position_offset)
        if self.noise_alpha and self.training and self.noise.keys is not None:
            x = with_noise(x, lengths, self.noise_alpha, self.noise.keys[0])
        return self.ln_e(x)

    def postprocess_logits(self, logits: Tensor) -> Tensor:
        """Return logits from the head's output, which LoRA and Adapter v2 change before this."""
        divisor, cap = self.config.logit_divisor, self.config.logit_softcap
        logits = logits if divisor == 1.0 else logits / divisor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def rotations(self, positions: Tensor, lengths: tuple[int, ...], dtype: torch.dtype) -> list[Rotation | None]:
        """Return the rotation of each layer, None where it has none; see RotaryEmbedding."""
        everywhere = within = self.rope(positions, lengths, dtype)
        if self.local_rope is not self.rope:
            within = self.local_rope(positions, lengths, dtype)
        unrotated: Rotation | None = None
        if self.config.query_growth_unrotated:
            unrotated, everywhere = Rotation(None, None, everywhere.query_scale), everywhere._replace(query_scale=None)
            within = within._replace(query_scale=None)
        layers = range(len(self.h))
        kinds = [everywhere if self.config.window(layer) is None else within for layer in layers]
        return [unrotated if layer in self.config.unrotated_layers else kinds[layer] for layer in layers]

    def needs_reread(self, cache: LayerCache, length: int) -> bool:
        """Return whether a sequence that grows to `length` tokens must be read again.

        Its keys in the cache may be rotated by other angles than LongRoPE has for that length.
        """
        return cache.length > 0 and cache.uses_long_rope != self.rope.is_long(length)

    def kv_cache(self, batch_size: int, max_length: int, device: str | None = None) -> KVCache:
        """Make an empty cache in the model's dtype for `batch_size` sequences of up to `max_length` tokens.

        Args:
            device: None for that of each layer; on "meta" the cache takes no memory and tells its size.
        """
        return [
            block.token_mixer.new_cache(
                batch_size, max_length, torch.device(device or next(block.parameters()).device), self.dtype
            )
            for block in cast(Iterable[Block], self.h)
        ]

    def attend_in_groups(self, size: int | None) -> None:
        """Let tokens attend within groups of so many in training, half the heads in shifted ones; None: to all before.

        Raises:
            UsageError: a layer has no attention, or the groups cannot be halved.
        """
        for block in cast(Iterable[Block], self.h) if size else ():
            if block.attn is None or block.mixer is not None:
                raise UsageError(f"--attention_group {size}: {self.config.name} has layers without attention")
            if block.attn.scores.chunk:
                raise UsageError(f"--attention_group {size}: {self.config.name} attends within chunks already")
            if size == 1:
                raise UsageError("--attention_group 1: expected at least 2, of which half the heads see the other half")
            block.attn.group = size

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the hidden states: the embedding's, or if it is quantized its scales'."""
        if isinstance(told := getattr(self.wte, "dtype", None), torch.dtype):  # by what a method has attached
            return told
        return next(p.dtype for p in self.wte.parameters() if p.is_floating_point())


def tokens_of(idx: Tensor, segments: Segments | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the sample that each token of (B, T) is of, and its position there, both int64 (B * T,)."""
    if segments is not None:
        return segments.samples, segments.positions
    rows = torch.arange(len(idx), device=idx.device).unsqueeze(1).expand_as(idx)
    return rows.flatten(), positions.expand_as(idx).flatten()


class Block(nn.Module):
    """A token mixer, which is attention or another, and MLP around the residual stream.

    How it runs is `execution`'s to say, the seam for activation checkpointing and compilation.
    """

    layer_scale: Tensor | None

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.parallel, self.scale = config.parallel_residual, config.residual_scale
        pre, post = (partial(norm, config) if there else nn.Identity for there in (config.pre_norm, config.post_norm))
        self.norm_1 = pre()
        self.config, kinds = config, config.mixer(layer).split("+")
        self.attn = CausalSelfAttention(config, layer) if "attention" in kinds else None
        self.mixer = MIXERS[kinds[-1]](config) if kinds[-1] != "attention" else None
        self.post_norm_1 = post()
        mlp_class, intermediate_size = config.mlp(layer)
        self.norm_2 = pre() if mlp_class and not config.shared_attention_norm else None
        self.mlp = make_mlp(mlp_class, config, intermediate_size) if mlp_class else None
        if getattr(self.mlp, "reads_stream", False):
            self.norm_2 = nn.Identity()
        self.post_norm_2 = post()
        self.layer_input = LayerInput(config, activation(config)) if config.layer_input_size else None
        self.altup = AltUp(config) if config.n_stream > 1 else None
        self.laurel = Laurel(config) if config.laurel_rank else None
        self.register_buffer("layer_scale", torch.ones(1) if config.layer_scale else None)
        self.execution = BlockExecution()

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        segments: Segments | None,
        cache: AnyCache | None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output, (B, T, n_embd) like x; of several streams both are (n_stream, B, T, n_embd).

        Args:
            given: the layer's own input (B, T, layer_input_size), if it has one.
        """
        return self.execution.run(self, x, rotation, segments, cache, given)

    def compute(
        self,
        x: Tensor,
        rotation: Rotation | None,
        segments: Segments | None,
        cache: AnyCache | None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output for the arguments of `forward`, as a plain block computes it."""
        streams = None if self.altup is None else self.altup.predict(x)
        x = x if streams is None else streams[0]
        x, n_1, *parts = self.execution.pre_attention(self, x, rotation)
        y = self.token_mixer.mix(tuple(parts), segments, cache)
        del parts  # not to be held where no backward pass follows
        return self.with_input(self.execution.post_attention(self, x, n_1, y), given, streams)

    def with_input(self, x: Tensor, given: Tensor | None, streams: Tensor | None) -> Tensor:
        """Return x, or all streams corrected by it, with what the layer makes of its own input; see `forward`."""
        if self.altup is not None and streams is not None:
            streams = self.altup.correct(streams, x)
            x = streams[0] * self.altup.output_scale.to(x.dtype)
        if self.layer_input is not None and given is not None:
            made = self.layer_input(x, given)
            if streams is None:
                x = x + made
            else:  # the first stream, which the layer computes, goes without
                streams = torch.cat((streams[:1], streams[1:] + made))
        x = x if streams is None else streams
        return x if self.layer_scale is None else x * self.layer_scale.to(x.dtype)

    @property
    def token_mixers(self) -> dict[str, CausalSelfAttention | Mixer]:
        """Return what mixes the block's tokens, by its name here: one, or attention and another beside it."""
        return {name: module for name in ("attn", "mixer") if (module := getattr(self, name)) is not None}

    @property
    def token_mixer(self) -> CausalSelfAttention | Mixer | ParallelMixer:
        if self.attn is not None and self.mixer is not None:
            return ParallelMixer(self.config, self.attn, self.mixer)
        mixer = self.mixer if self.attn is None else self.attn
        assert mixer is not None
        return mixer

    # what comes before attention and what after it are functions of tensors alone, fit to be compiled

    def pre_attention(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Return x and the normed x, and what the token mixer projects that to: queries, keys, values, for attention.

        Who uses x further takes it from here, so that all its gradients come together in the norm.
        """
        x, n_1 = self.execution.add_and_norm(self.norm_1, x, Residual(None, 1.0))
        return x, n_1, *self.token_mixer.project(n_1, rotation)

    def post_attention(self, x: Tensor, n_1: Tensor, y: Tensor) -> Tensor:
        """Return the block's output, from its input, the normed input, and what attention gives."""
        execution, scale = self.execution, self.scale
        h = self.post_norm_1(self.token_mixer.proj(y))
        residual = Residual(None if self.parallel else h, scale)
        if self.laurel is not None:
            x, residual = (residual_stream(x, residual) + self.laurel(n_1)) * 2**-0.5, Residual(None, scale)
        if self.mlp is None:
            return residual_stream(x, residual)
        if self.norm_2 is not None:
            x, n_1 = execution.add_and_norm(self.norm_2, x, residual)
        h_2 = self.post_norm_2(self.mlp(n_1, execution.apply))
        return functional.sum_of_three(x, h, h_2) if self.parallel else torch.add(x, h_2, alpha=scale)


class BlockExecution:
    """Runs a block as it is written. Derived classes checkpoint its activations or compile its parts."""

    def run(self, block: Block, *inputs: Any) -> Tensor:
        """Return the output of the block for the arguments of its `forward`."""
        return block.compute(*inputs)

    def pre_attention(self, block: Block, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        return block.pre_attention(x, rotation)

    def post_attention(self, block: Block, x: Tensor, n_1: Tensor, y: Tensor) -> Tensor:
        return block.post_attention(x, n_1, y)

    def add_and_norm(self, norm: nn.Module, x: Tensor, residual: Residual) -> tuple[Tensor, Tensor]:
        """Return the residual stream with the residual added, and its norm, which is cheap to compute again."""
        return add_and_norm(norm, x, residual)

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a norm or an activation, whose output is cheap to compute again."""
        return function(x)


def quantize(model: GPT, format: str) -> GPT:
    """Quantize a model's linear layers and embedding, in place, before any method is attached to it.

    Args:
        format: a key of lit_gpt.quantization.formats.FORMATS.

    Raises:
        UsageError: the model has routed experts, which would stay as they are.
    """
    if model.config.n_expert:
        raise UsageError(f"--quantize {format}: {model.config.name} has routed experts, which cannot be quantized yet")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, QuantizedLinear(module, "int8" if path == "lm_head" else format))
    for path in ("wte", *(["layer_inputs.wte"] if model.layer_inputs else [])):
        model.set_submodule(path, QuantizedEmbedding(cast(nn.Embedding, model.get_submodule(path))))
    model.tie_weights()
    return model
