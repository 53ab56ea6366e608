"""LoRA as a finetuning method."""

from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.lora import starts
from lit_gpt.methods.lora.attaching import attach
from lit_gpt.methods.lora.layers import lora_layers
from lit_gpt.methods.lora.merging import merge
from lit_gpt.methods.method import Method, Start
from lit_gpt.model.gpt import GPT

NAME = "lora"


class LoRA(Method):
    """Trains low-rank updates of the chosen projections, which can be folded into them."""

    name = NAME
    merges = True
    config: LoRAConfig

    def attach(self, model: GPT) -> GPT:
        return attach(model, self.config)

    def initialize(self, model: GPT, start: Start | None = None) -> None:
        starts.initialize(model, self.config, start)

    def learning_rate_ratio(self, name: str) -> float:
        return self.config.lr_ratio if name.endswith(("lora_B", "scale_B")) else 1.0

    @property
    def first_uniform_layer(self) -> int:
        """Return no layer of any model, where layers have ranks of their own."""
        return 10**9 if self.config.ranks else 0

    @property
    def unsharded(self) -> str | None:
        plain = LoRAConfig()
        if unsharded := self.config.parts.unsharded:
            return unsharded
        for name in ("update", "init", "train", "lr_ratio"):
            value = getattr(self.config, name)
            if value not in (getattr(plain, name), "multi", "gaussian"):
                return f"--lora_{name} {value}"
        return None

    def merge(self, model: GPT) -> GPT:
        return merge(model)

    def hold_merge(self, model: GPT) -> None:
        for layer in lora_layers(model).values():
            layer.merged()
