"""A method of its own in one file: a learned scale on what each MLP gives (in the manner of Liu et al. 2022, IA3).

    ACTION=finetune python tests/methods/fifth_method.py --checkpoint_dir ... --data_dir ... --out_dir ...

ACTION is finetune, plan or generate, with the flags of those scripts. tests/methods/test_fifth_method.py runs it.
"""

import os
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_gpt.cli import NonNegativeInt, PositiveFloat, run
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs
from lit_gpt.methods import registry
from lit_gpt.methods.method import Method, mark_trainable
from lit_gpt.model.gpt import GPT
from lit_gpt.training.args import TrainArgs

finetuned_path: Path | None = None  # Attach this, to generate.
learning_rate: PositiveFloat = 0.01


@dataclass(frozen=True)
class ScaleConfig:
    """Scales"""

    prefix: ClassVar[str] = "scale_"

    start_layer: NonNegativeInt = 0  # Scale the MLPs from this layer on.


class ScaledOutput(nn.Module):
    trained_parameters = ("scale",)

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features
        self.scale = nn.Parameter(torch.ones(linear.out_features, device=next(linear.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale.to(x.dtype)

    def record(self, tape: Any, x: Tensor, name: str) -> Tensor:
        y = tape.linear(self.linear, x, name)
        tape.scale(y, self.scale, torch.zeros_like(self.scale))
        return y


class Scale(Method):
    name = "scale"
    merges = True
    config: ScaleConfig

    @property
    def first_trained_layer(self) -> int:
        return self.config.start_layer

    @property
    def first_uniform_layer(self) -> int:
        return self.config.start_layer

    def attach(self, model: GPT) -> GPT:
        for block in model.h[self.config.start_layer :]:
            block.mlp.proj = ScaledOutput(block.mlp.proj)
        mark_trainable(model)
        return model

    def merge(self, model: GPT) -> GPT:
        for block in model.h[self.config.start_layer :]:
            layer = block.mlp.proj
            with torch.no_grad():
                layer.linear.weight.mul_(layer.scale.to(layer.linear.weight.dtype).unsqueeze(1))
            block.mlp.proj = layer.linear
        return model


registry.register(Scale.name, ScaleConfig, lambda: Scale)


def finetune(config: ScaleConfig, args: TrainArgs) -> None:
    from lit_gpt.training.setup import finetune

    finetune(args, Scale(config))


def generate(prompt: PromptArgs, sampling: SamplingArgs, model: ModelArgs) -> None:
    from lit_gpt.generation.answer import read_prompt
    from lit_gpt.generation.answerer import Answerer

    folder = Path(os.environ["CHECKPOINT_DIR"])
    answerer = Answerer.from_finetuned(folder, finetuned_path, Scale.name, sampling, model)
    read_prompt(prompt, sampling, model).answer(answerer)


if __name__ == "__main__":
    if os.environ["ACTION"] == "plan":
        runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "plan.py"), run_name="__main__")
    else:
        run({"finetune": finetune, "generate": generate}[os.environ["ACTION"]])
