"""LoRA (Hu et al. 2021, arXiv 2106.09685): each chosen projection W gets an update (alpha / r) B A of rank r.

Attaches to a base GPT that exists, by wrapping its linear layers. What A and B are made of differs by method, see
lit_gpt.methods.lora.factors; at first the update is zero, so that a freshly attached model gives exactly the base's
logits.
"""

from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.lora.attaching import attach, skeleton, targets, updates
from lit_gpt.methods.lora.layers import LoRAExperts, LoRALinear, lora_layers
from lit_gpt.methods.lora.merging import (
    merge,
    merged_config,
    merged_tensor,
    stays_quantized,
    write_merged,
    write_shifted,
)
from lit_gpt.methods.lora.method import NAME, LoRA
from lit_gpt.methods.lora.starts import explained_ranks

__all__ = [
    "NAME", "LoRA", "LoRAConfig", "LoRAExperts", "LoRALinear", "attach", "explained_ranks", "lora_layers", "merge",
    "merged_config", "merged_tensor", "skeleton", "stays_quantized", "targets", "updates", "write_merged",
    "write_shifted",
]  # fmt: skip
