"""Full finetuning: all of the base's weights train."""

from pathlib import Path

import torch
from torch import nn

from lit_gpt.errors import UsageError
from lit_gpt.methods.hyperparameters import FullConfig
from lit_gpt.methods.method import Method
from lit_gpt.model.gpt import GPT


class Full(Method):
    """Trains all weights of the base."""

    name = "full"
    trains_base = True
    config: FullConfig

    @property
    def settings(self) -> dict[str, object]:
        """Return nothing: weights that were trained need no hyperparameters to be used."""
        return {}

    def attach(self, model: GPT) -> GPT:
        return model.requires_grad_(True)

    def weight_dtype(self, precision: str) -> torch.dtype:
        """Return float32, in which small steps are not lost, unless `--master_weights false` asks for `precision`."""
        return torch.float32 if self.config.master_weights else super().weight_dtype(precision)

    def warm_start(self, model: nn.Module, path: Path, base: str, quantization: str | None = None) -> None:
        """Refuse: the base itself is where full finetuning starts. Raises UsageError."""
        raise UsageError(
            f"--finetuned_path {path}: all weights train; give the folder to start from by --checkpoint_dir"
        )
