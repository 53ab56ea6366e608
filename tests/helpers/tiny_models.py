"""Make tiny models of every family with transformers, and convert them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.tokenizers import bpe_tokenizer
from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.families.registry import families

# Families all of whose layouts go through every test each time; together they use every part of the model that is not
# of one family alone. The others go through BRIEF, and through the rest with the slow tests.
THOROUGH = {
    "falcon", "gemma", "gpt2", "gpt_neox", "llama", "mpt", "olmo2", "phi3", "qwen_moe", "smollm3",
}  # fmt: skip
BRIEF = {
    "test_logits_equal_transformers", "test_cache_changes_nothing", "test_round_trip_is_bit_identical",
    "test_gradient_equals_transformers_on_a_padded_batch", "test_packed_samples_do_not_see_each_other",
    "test_greedy_equals_transformers", "test_out_and_in_again_is_bit_identical",
    "test_merged_equals_unmerged", "test_only_and_all_of_lora_trains",
}  # fmt: skip
LAYOUTS = [(family.__name__.rpartition(".")[2], name) for family in families() for name in family.tiny_hf()]


def tiny_hf_model(family: str, layout: str, **fields) -> torch.nn.Module:
    """Return a small transformers model with random weights of all kinds, norms and biases included."""
    module = next(f for f in families() if f.__name__.endswith("." + family))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(module.tiny_hf(**fields)[layout]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            center = parameter.mean() if parameter.ndim == 1 else 0.0  # 1 of a norm's weight, or 0 if 1 is added to it
            parameter.normal_(std=0.15).add_(center)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.15)
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    return model


@dataclass
class Tiny:
    """Hold a converted checkpoint folder and the transformers model that it came from."""

    folder: Path
    hf: torch.nn.Module


def make_base(folder: Path, family: str = "llama", layout: str = "llama3", **fields) -> Path:
    """Make a converted tiny checkpoint with a tokenizer in `folder`, and return `folder`."""
    fields |= {"vocab_size": 320} | (
        {"max_position_embeddings": 256} if family in ("llama", "falcon", "gpt_neox") else {}
    )
    tiny_hf_model(family, layout, **fields).save_pretrained(folder)
    bpe_tokenizer(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return folder


def model_of(family: str, layout: str, folder: Path, **fields) -> GPT:
    """Make a converted tiny checkpoint without a tokenizer in `folder`, and return its model."""
    tiny_hf_model(family, layout, **fields).save_pretrained(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return load_model(folder)
