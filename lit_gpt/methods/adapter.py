"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): a learned prompt in the upper layers' attention.

In each layer from `start_layer` on, the queries also attend to the keys and values of `prompt_length` learned vectors,
by a softmax of their own; what they find is added to the attention's output, multiplied by a gate per head that starts
at zero. A freshly attached model therefore gives exactly the base's logits.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lit_gpt.errors import UsageError
from lit_gpt.methods.hyperparameters import AdapterConfig
from lit_gpt.methods.method import Method, mark_trainable
from lit_gpt.model.attention import CausalSelfAttention
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.sdpa import sdpa


class Adapter(Method):
    """Trains a prompt in the attention of the layers from `start_layer` on."""

    name = "adapter"
    config: AdapterConfig

    @property
    def first_trained_layer(self) -> int:
        return self.config.start_layer

    @property
    def first_uniform_layer(self) -> int:
        return self.config.start_layer

    def attach(self, model: GPT) -> GPT:
        return attach(model, self.config)


class AdapterPrompt(nn.Module):
    """Holds the learned prompt of one layer in float32, for `CausalSelfAttention.prefix`."""

    trained_parameters = ("prompt", "gate")

    def __init__(self, attention: CausalSelfAttention, config: AdapterConfig) -> None:
        super().__init__()
        device, size = next(attention.parameters()).device, attention.qkv.in_features
        self.prompt = nn.Parameter(torch.randn(config.prompt_length, size, device=device, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(attention.n_head, device=device, dtype=torch.float32))

    def forward(self, q: Tensor, attention: CausalSelfAttention) -> Tensor:
        """Return what queries (B, n_head, T, head_size) find in the prompt, gated, in the same shape and dtype."""
        # Computed anew each time: keys kept from an evaluation would leave the prompt without a gradient.
        # Made as the layer makes its own, norms included, but at no position.
        _, k, v = attention.project_qkv(self.prompt.to(q.dtype).unsqueeze(0), rotation=None)
        k, v = (x.expand(q.size(0), -1, -1, -1) for x in (k, v))
        return sdpa(q, k, v, attention.scores) * self.gate.to(q.dtype).view(1, -1, 1, 1)

    def record(self, attention: CausalSelfAttention, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prompt's keys and values (1, n_query_groups, prompt_length, head_size) and the gates (n_head,).

        All are float32, rounded to `dtype` as the model rounds them; a decoding tape attends to them.
        """
        _, k, v = attention.project_qkv(self.prompt.to(dtype).unsqueeze(0), rotation=None)
        k, v, gate = (tensor.float().contiguous() for tensor in (k, v, self.gate.to(dtype)))
        return k, v, gate


def attach(model: GPT, config: AdapterConfig) -> GPT:
    """Give the layers from `start_layer` on their prompts, in place, and let only what is attached train.

    Raises:
        UsageError: there is no attention from that layer on.
    """
    if not add_prompts(model, config):
        raise UsageError(f"--adapter_start_layer {config.start_layer}: no layer from there on has attention; use LoRA")
    mark_trainable(model)
    return model


def add_prompts(model: GPT, config: AdapterConfig) -> int:
    """Give the layers from `start_layer` on that attend to keys of their own their prompts, in place.

    Returns:
        how many these are.
    """
    layers, start = model.config.n_layer, config.start_layer
    if start >= layers:
        raise UsageError(f"--adapter_start_layer {start}: the model has only {layers} layers")
    above = list(cast(Iterable[Block], model.h))[start:]
    attentions = [block.attn for block in above if block.attn is not None and block.attn.n_query_groups]
    for attention in attentions:
        attention.prefix = AdapterPrompt(attention, config)
    return len(attentions)
