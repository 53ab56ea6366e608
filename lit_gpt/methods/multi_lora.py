"""Several LoRAs on one base: each row of a batch goes through the one chosen for it (Sheng et al. 2023, S-LoRA).

They serve generation only. Nothing is merged, so that a choice is no more than a few numbers, and the base may be
quantized.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.errors import UserError
from lit_gpt.methods import finetuned_file, lora
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.finetuned_model import method_of
from lit_gpt.methods.method import LinearWrapper, experts_of
from lit_gpt.model.gpt import GPT
from lit_gpt.model.moe import Routing, grouped_product, rows_per_expert
from lit_gpt.text.prompt_style import PromptStyle


class RowAdapters:
    """Says which LoRA each row of the batch goes through; 0 is none.

    Attributes:
        rows: int64 (B,), the number of each row.
        same: the number that all rows have, or None if they differ.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows = torch.zeros(1, dtype=torch.long, device=device)
        self.same: int | None = 0

    def set(self, numbers: Sequence[int]) -> None:
        """Choose the LoRA of each row from now on."""
        self.rows = torch.tensor(numbers, device=self.rows.device)
        self.same = numbers[0] if len(set(numbers)) == 1 else None


class MultiLoRALayer(LinearWrapper):
    """Holds an update B A of a layer from each of n LoRAs, of which each row takes the chosen one's.

    A is (n, rank, in_features) and B (n, out_features, rank), where rank is the largest of all; a layer of experts has
    n_expert of both for each LoRA. Lower ranks are filled up with zeros, and a LoRA that leaves the layer as it is has
    zeros only.
    """

    A: Tensor
    B: Tensor

    def __init__(self, linear: nn.Module, choice: RowAdapters, n: int) -> None:
        super().__init__(linear)
        self.choice = choice
        self.register_buffer("A", torch.zeros(n, *self.experts, 0, self.in_features), persistent=False)
        self.register_buffer("B", torch.zeros(n, *self.experts, self.out_features, 0), persistent=False)

    def add(self, A: Tensor, B: Tensor) -> None:
        """Add a LoRA's A and B, of the shapes that `lora.updates` gives, in the model's dtype and on its device."""
        missing = A.size(-2) - self.A.size(-2)
        more, less = max(missing, 0), max(-missing, 0)
        self.A = torch.cat((F.pad(self.A.to(A), (0, 0, 0, more)), F.pad(A, (0, 0, 0, less)).unsqueeze(0)))
        self.B = torch.cat((F.pad(self.B.to(B), (0, more)), F.pad(B, (0, less)).unsqueeze(0)))

    def add_none(self) -> None:
        """Add a LoRA that leaves the layer as it is."""
        self.add(self.A.new_zeros(self.A.shape[1:]), self.B.new_zeros(self.B.shape[1:]))


class MultiLoRALinear(MultiLoRALayer):
    """A linear layer with updates from several LoRAs."""

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        low = tape.lora_down(self.A, x, by_row=True)
        y = tape.linear(self.linear, x, name)
        tape.lora_up(y, low, 0, self.B.mT.contiguous(), (0, y.size(1)), by_row=True)
        tape.choice = self.choice
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, out_features) of x (B, T, in_features), each row through its LoRA."""
        same = self.choice.same
        if same is not None and not torch.compiler.is_compiling():  # what is compiled must not depend on the number
            return F.linear(F.linear(x, self.A[same]), self.B[same]).add_(self.linear(x)) if same else self.linear(x)
        A, B = self.A[self.choice.rows], self.B[self.choice.rows]
        return self.linear(x) + (x @ A.mT) @ B.mT


class MultiLoRAExperts(MultiLoRALayer):
    """A layer of experts with updates from several LoRAs."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        """Return (rows, out_features) of x (rows, in_features), whose rows are sorted by expert."""
        chosen, order, n_expert = self.choice.rows, routes.order, len(routes.counts)
        owners = chosen[order // (len(order) // len(chosen))]  # the LoRA of each place
        counts = torch.tensor(routes.counts, device=x.device)
        experts = torch.arange(n_expert, device=x.device).repeat_interleave(counts)
        # an expert under a LoRA is one expert, under another another
        pairs, places = (owners * n_expert + experts).sort(stable=True)
        per_pair = rows_per_expert(pairs, len(self.A) * n_expert)
        low = grouped_product(x[places], self.A.flatten(0, 1), per_pair)
        return self.linear(x, routes).index_add(0, places, grouped_product(low, self.B.flatten(0, 1), per_pair))


class LoRAPool:
    """Holds the LoRAs that are loaded beside a base, by number; 0 is the base alone.

    Args:
        style: the base's prompt style.
        fixed: whether that style holds for the LoRAs too, in place of those that they were trained in.
    """

    def __init__(self, model: GPT, base: BaseCheckpoint, style: PromptStyle, fixed: bool = False) -> None:
        self.model, self.base, self.fixed = model, base, fixed
        self.choice = RowAdapters(model.wte.weight.device)
        self.styles = [style]  # by number
        self.numbers: dict[Path, int] = {}  # by file
        self.layers: dict[str, MultiLoRALayer] = {}

    @classmethod
    def beside(
        cls, base: BaseCheckpoint, paths: Iterable[Path | None], style: PromptStyle, fixed: bool = False, **place: Any
    ) -> "LoRAPool":
        """Load a base, quantized as some LoRA files were trained, and those files beside it.

        Args:
            paths: None stands for the base alone.
            place: dtype and device of the model.

        Raises:
            UserError: a file is no LoRA file or of another base, or the files were trained on bases that were quantized
                in different formats.
        """
        trained = {path: read(path, base).get("quantize") if path else None for path in paths}
        base = cls.common(base, trained)  # before the model takes its time
        loras = cls(base.build(**place), base, style, fixed)
        for path in filter(None, trained):
            loras.load(path)
        return loras

    @staticmethod
    def common(base: BaseCheckpoint, trained: dict[Path | None, str | None]) -> BaseCheckpoint:
        """Return the base, quantized as the base of each file was when the file was trained.

        Args:
            trained: the format of each file's base; None: not quantized. The key None stands for the base alone.

        Raises:
            UserError: the files want different formats, and `--quantize` has not named one.
        """
        formats = {format: path for path, format in trained.items() if base.quantize is None}
        if len(quantized := sorted(filter(None, formats))) > 1:
            one, other = quantized[:2]
            raise UserError(
                f"{formats[one]}: trained on a base in {one}, {formats[other]} on one in {other}; use one at a time"
            )
        for path, format in trained.items():
            base = base.quantized_as(format, path) if path else base
        if len(formats) > 1:
            path = formats[base.quantize]
            raise UserError(f"{path}: trained on a base in {base.quantize}; add --quantize {base.quantize} for all")
        return base

    def load(self, path: Path) -> int:
        """Return the number of a file's LoRA, and load the file unless it has been loaded.

        Raises:
            UserError: the file is no LoRA file, of another base, or trained on a base that was quantized otherwise.
        """
        key = Path(path).resolve()
        if key in self.numbers:
            return self.numbers[key]
        record, model = read(path, self.base), self.model
        if self.base.quantized_as(trained_on := record.get("quantize"), path).quantize != self.base.quantize:
            raise UserError(f"{path}: trained on a base in {trained_on}; start with --quantize {trained_on}")
        device = self.choice.rows.device
        config, added = method_of(record, path).config, set[str]()
        for name, A, B in lora.updates(model.config, config, record["state"], path):
            self.layer(name).add(A.to(device, model.dtype), B.to(device, model.dtype))
            added.add(name)
        for name in self.layers.keys() - added:
            self.layers[name].add_none()
        self.numbers[key] = len(self.styles)
        self.styles.append(self.styles[0] if self.fixed else PromptStyle.from_dict(record["prompt_style"]))
        return self.numbers[key]

    def layer(self, name: str) -> MultiLoRALayer:
        """Return the layer at a path of the model, and wrap it first if no LoRA has adapted it yet."""
        if name not in self.layers:
            linear = self.model.get_submodule(name)
            wrapper = MultiLoRAExperts if experts_of(linear) else MultiLoRALinear
            self.layers[name] = wrapper(linear, self.choice, len(self.styles))
            self.model.set_submodule(name, self.layers[name])
        return self.layers[name]

    def choose(self, numbers: Sequence[int]) -> None:
        """Choose the LoRA of each row that the model computes from now on."""
        self.choice.set(numbers)


def read(path: Path, base: BaseCheckpoint) -> dict[str, Any]:
    """Read a LoRA file of this base. Raises UserError if it is not one."""
    return finetuned_file.read_file(path, lora.NAME, base.fingerprint)
