"""What is served under which name: a base, and finetuned files that have been seen to change what it says."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation.sequence import Row
from lit_gpt.methods import lora
from lit_gpt.methods.finetuned_file import read_file
from lit_gpt.methods.finetuned_model import attach_record, method_of
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.model.gpt import GPT
from lit_gpt.serving.errors import APIError
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

PROBE_TOKENS = 32
LIKE = "out/lora/alpaca/lit_model_lora_finetuned.pth"


@dataclass(frozen=True)
class Served:
    """A model that requests may name.

    Attributes:
        style: how its conversations are rendered.
        lora: its number in the pool; 0: none.
        method: how its file was trained; None: it is the base.
        distance: how far its next tokens are from the base's, in nats: the mean Kullback-Leibler divergence on a probe.
    """

    name: str
    style: PromptStyle
    lora: int = 0
    method: str | None = None
    distance: float | None = None


class Catalog:
    """The models that are served: one GPT, and what is told apart by its rows.

    Attributes:
        served: by name.
        fingerprint: of the base.
    """

    def __init__(self, model: GPT, base: BaseCheckpoint, pool: LoRAPool | None, served: Iterable[Served]) -> None:
        self.model, self.pool, self.fingerprint = model, pool, base.fingerprint
        self.tokenizer: Tokenizer = base.tokenizer
        self.served = {model.name: model for model in served}

    @classmethod
    def with_loras(
        cls, base: BaseCheckpoint, loras: Mapping[str, Path], style: PromptStyle | None, **place: Any
    ) -> "Catalog":
        """Load a base, under its folder's name, and LoRA files beside it, under theirs.

        Args:
            style: in which all conversations are rendered; None: each in its own.
            place: dtype and device of the model.

        Raises:
            UsageError: a LoRA has the base's name.
            UserError: a file does not fit the base, or changes nothing.
        """
        own, name = style or base.prompt_style, name_of(base)
        if name in loras:
            raise UsageError(f"--loras {name}=...: is the base's own name; choose another")
        pool = LoRAPool.beside(base, [None, *loras.values()], own, fixed=style is not None, **place)
        probe = probe_logits(pool.model)
        served = [Served(name, own)]
        for lora_name, path in loras.items():
            number = pool.load(path)
            pool.choose([number])
            distance = checked_distance(probe, probe_logits(pool.model), path)
            served.append(Served(lora_name, pool.styles[number], number, lora.NAME, distance))
        pool.choose([0])
        return cls(pool.model, pool.base, pool, served)

    @classmethod
    def with_finetuned(cls, base: BaseCheckpoint, path: Path, style: PromptStyle | None, **place: Any) -> "Catalog":
        """Load a base with one finetuned file of any method attached, under the name of the file's folder.

        Raises:
            UserError: the file does not fit the base, or changes nothing.
        """
        record = read_file(path, None, base.fingerprint)
        method_of(record, path)  # before the model takes its time
        base = base.quantized_as(record.get("quantize"), path)
        model = base.build(**place)
        probe = probe_logits(model)
        attach_record(model, path, record)
        distance = checked_distance(probe, probe_logits(model.eval()), path)
        own = style or PromptStyle.from_dict(record["prompt_style"])
        served = Served(Path(path).resolve().parent.name, own, method=record["method"], distance=distance)
        return cls(model, base, None, [served])

    def find(self, name: str) -> Served:
        """Return the model of a name. Raises APIError if there is none."""
        if name not in self.served:
            known = ", ".join(self.served)
            raise APIError(404, f"model: '{name[:80]}' is not served; expected {known}", "model", "model_not_found")
        return self.served[name]

    def choose(self, rows: list[Row]) -> None:
        """Have the model compute these rows, each as its own model does."""
        if self.pool:
            self.pool.choose([row.lora for row in rows])


def name_of(base: BaseCheckpoint) -> str:
    return base.checkpoint_dir.resolve().name


def named_files(arguments: Iterable[str]) -> dict[str, Path]:
    """Return {name: file} of arguments NAME=FILE. Raises UsageError for others, or a name that comes twice."""
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--loras {argument}: expected NAME=FILE, such as alpaca={LIKE}")
        if name in named:
            raise UsageError(f"--loras {argument}: the name {name} comes twice; choose another")
        named[name] = Path(path).expanduser()
    return named


@torch.no_grad()
def probe_logits(model: GPT) -> Tensor:
    """Return the logits that follow each of some tokens from all over the vocabulary, (PROBE_TOKENS, vocabulary)."""
    n = min(PROBE_TOKENS, model.config.block_size)
    ids = torch.linspace(0, model.config.vocab_size - 1, n).long()
    return model(ids.unsqueeze(0).to(model.wte.weight.device))[0, :, : model.config.vocab_size].float()


def checked_distance(base: Tensor, finetuned: Tensor, path: Path) -> float:
    """Return the mean Kullback-Leibler divergence from the base's next token to a finetuned model's, in nats.

    Raises:
        UserError: the two do not differ at all, or are no numbers: what is in the file does not act as it should.
    """
    if torch.equal(base, finetuned):
        raise UserError(f"{path}: changes nothing of what the base says on a probe; it is not trained, or not for it")
    p, q = base.log_softmax(-1), finetuned.log_softmax(-1)
    if not q.isfinite().all():
        raise UserError(f"{path}: makes logits that are not numbers; train it again")
    return float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0))
