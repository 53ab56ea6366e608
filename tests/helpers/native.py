"""Take the fast decoding step by hand."""

import torch
from torch import Tensor

from lit_gpt import GPT
from lit_gpt.generation.sequence import DecodingRow, Step


def native_logits(step: Step, model: GPT, ids: list[int]) -> Tensor:
    """Return the logits (padded_vocab_size,) of the last token, the others having been read by the model."""
    cache = model.kv_cache(1, len(ids))
    model.hidden(torch.tensor([ids[:-1]]), cache=cache)
    return step([DecodingRow(list(ids), 1, cache=cache)], cache)[0].clone()
