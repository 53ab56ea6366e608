"""Several LoRAs on one base: each row of a batch goes through the one chosen for it (Sheng et al. 2023, S-LoRA).

They serve generation only. Nothing is merged, so that a choice is no more than a few numbers, and the base may be
quantized.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.method import LinearWrapper, experts_of
from lit_gpt.model.gpt import GPT
from lit_gpt.model.moe import Groups, Routing, grouped_product
from lit_gpt.text.prompt_style import PromptStyle


@dataclass(frozen=True, eq=False)
class Update:
    """What a LoRA adds to a layer's output: B^T A x.

    A is (rank, in_features) and B (rank, out_features), in the model's dtype and on its device; of a layer of experts
    each has its own.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.size(-2)


@dataclass(eq=False)
class LoadedLoRA:
    """A LoRA in memory.

    Attributes:
        updates: by the path of the layer.
        table: where its updates of all adapted layers lie, see `RowChoice.addresses`.
    """

    style: PromptStyle
    updates: dict[str, Update]
    table: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.long))

    @cached_property
    def nbytes(self) -> int:
        return sum(update.A.nbytes + update.B.nbytes for update in self.updates.values())


class RowLoRAs:
    """Says which LoRA each row of the batch goes through.

    Attributes:
        loras: of each row; None: the base alone.
        addresses: see `RowChoice`.
    """

    def __init__(self) -> None:
        self.set([None])

    def set(self, loras: Sequence[LoadedLoRA | None]) -> None:
        """Choose the LoRA of each row from now on."""
        self.loras, self.same = loras, len(set(loras)) == 1
        self.addresses = torch.tensor([lora.table.data_ptr() if lora else 0 for lora in loras])


class MultiLoRALayer(LinearWrapper):
    """A layer to whose output each row's LoRA adds its own update.

    Attributes:
        number: among the layers that LoRAs adapt.
        ranks: the most that a LoRA has here, a tensor, so that a recorded step sees when it grows.
        only: the update of all rows, where they have one LoRA.
    """

    ranks: Tensor

    def __init__(self, linear: nn.Module, path: str, choice: RowLoRAs, number: int, empty: Tensor) -> None:
        super().__init__(linear)
        self.path, self.choice, self.number = path, choice, number
        self.register_buffer("ranks", torch.tensor(0), persistent=False)
        A, B = (empty.reshape(*self.experts, 0, size) for size in (self.in_features, self.out_features))
        self.none = self.only = Update(A, B)

    def update(self, lora: LoadedLoRA | None) -> Update:
        return self.none if lora is None else lora.updates.get(self.path, self.none)

    def stacked(self, loras: Sequence[LoadedLoRA | None]) -> tuple[Tensor, Tensor]:
        """Return A (loras, ..., ranks, in_features) and B (loras, ..., ranks, out_features), zeros where one has less.

        They live as long as the product: what is held is the LoRAs.
        """
        updates = [self.update(lora) for lora in loras]
        most = max(update.rank for update in updates)
        A, B = (
            torch.stack([F.pad(x, (0, 0, 0, most - x.size(-2))) for x in matrices])
            for matrices in ([update.A for update in updates], [update.B for update in updates])
        )
        return A, B


class MultiLoRALinear(MultiLoRALayer):
    """A linear layer with updates from several LoRAs."""

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        low = tape.row_lora_down(self.number, x, int(self.ranks))
        y = tape.linear(self.linear, x, name)
        tape.row_lora_up(y, low, self.number)
        tape.choice = self.choice
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, out_features) of x (B, T, in_features), each row through its LoRA."""
        if self.choice.same:
            A, B = self.only.A, self.only.B
            return (F.linear(x, A) @ B).add_(self.linear(x)) if len(A) else self.linear(x)
        A, B = self.stacked(self.choice.loras)
        return self.linear(x) + (x @ A.mT) @ B


class MultiLoRAExperts(MultiLoRALayer):
    """A layer of experts with updates from several LoRAs."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        """Return (rows, out_features) of x (rows, in_features), whose rows are sorted by expert."""
        order, n_expert, loras = routes.order, routes.groups.n_expert, list(dict.fromkeys(self.choice.loras))
        chosen = torch.tensor([loras.index(lora) for lora in self.choice.loras], device=x.device)
        owners = chosen[order // (len(order) // len(chosen))]  # the LoRA of each place
        # an expert under a LoRA is one expert, under another another
        pairs, places = (owners * n_expert + routes.groups.experts).sort(stable=True)
        per_pair = Groups(pairs, len(loras) * n_expert)
        A, B = (matrices.flatten(0, 1) for matrices in self.stacked(loras))
        low = grouped_product(x[places], A, per_pair)
        return self.linear(x, routes).index_add(0, places, grouped_product(low, B.mT, per_pair))


class LoRAPool:
    """Holds the LoRAs that are loaded beside a base, by number; 0 is the base alone.

    Args:
        style: the base's prompt style.
        fixed: whether that style holds for the LoRAs too, in place of those that they were trained in.

    Attributes:
        loaded: by number, the least recently chosen first.
        limit: bytes that they may take together; None: as many as there is room for.
    """

    def __init__(self, model: GPT, base: BaseCheckpoint, style: PromptStyle, fixed: bool = False) -> None:
        self.model, self.base, self.style, self.fixed = model, base, style, fixed
        self.choice, self.chosen = RowLoRAs(), list[int]()
        self.numbers: dict[Path, int] = {}  # by file
        self.last = 0  # number
        self.loaded: OrderedDict[int, LoadedLoRA] = OrderedDict()
        self.layers: dict[str, MultiLoRALayer] = {}
        self.limit: int | None = None
        self.skeletons: dict[LoRAConfig, GPT] = {}

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
        paths = list(paths)
        base = cls.fitting(base, paths)  # before the model takes its time
        loras = cls(base.build(**place), base, style, fixed)
        for path in filter(None, paths):
            loras.load(path)
        return loras

    @staticmethod
    def fitting(base: BaseCheckpoint, paths: Iterable[Path | None]) -> BaseCheckpoint:
        """Return the base, quantized as the base of each file was when the file was trained.

        Args:
            paths: of the files; None stands for the base alone.

        Raises:
            UserError: the files want different formats, and `--quantize` has not named one.
        """
        trained = {path: read(path, base).get("quantize") if path else None for path in paths}
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
        if key not in self.numbers:
            self.numbers[key] = self.add(self.read(path))
        return self.numbers[key]

    def read(self, path: Path) -> LoadedLoRA:
        """Read a file's LoRA, which is not part of the pool yet; for the errors see `load`. Any thread may.

        The file is read, not mapped: of one that is cut short meanwhile a mapping would end the process.
        """
        record, model = read(path, self.base, mmap=False), self.model
        if self.base.quantized_as(trained_on := record.get("quantize"), path).quantize != self.base.quantize:
            raise UserError(f"{path}: trained on a base in {trained_on}; start with --quantize {trained_on}")
        config = method_of(record, path).config
        if config not in self.skeletons:  # of which a thousand files may have a few
            self.skeletons[config] = lora.skeleton(model.config, config)
        updates = {}
        for name, A, B in lora.updates(self.skeletons[config], record["state"], path):
            device = next(model.get_submodule(name).parameters()).device
            updates[name] = Update(*(x.to(device, model.dtype).contiguous() for x in (A, B.mT)))
        return LoadedLoRA(self.style if self.fixed else PromptStyle.from_dict(record["prompt_style"]), updates)

    def add(self, new: LoadedLoRA, number: int | None = None, kept: Collection[int] = ()) -> int:
        """Take a LoRA into the pool and return its number. No row may be computed meanwhile.

        Args:
            number: that it had before it left; None: a new one.
            kept: numbers that do not leave to make room.
        """
        if number is None:
            number = self.last = self.last + 1
        left = [other for other in self.loaded if other not in kept]
        while left and self.limit is not None and self.nbytes + new.nbytes > self.limit:
            self.remove(left.pop(0))
        for name, update in new.updates.items():
            layer = self.layer(name)
            if update.rank > layer.ranks:
                layer.ranks = torch.tensor(update.rank)
        self.loaded[number], self.chosen = new, []
        for one in self.loaded.values():
            if len(one.table) < len(self.layers):
                one.table = self.table(one)
        return number

    def remove(self, number: int) -> None:
        """Take a LoRA out of the pool. Rows that go through it must have left."""
        self.loaded.pop(number, None)
        self.choose([0])  # so that nothing holds it any more

    @property
    def nbytes(self) -> int:
        """Return how many bytes the LoRAs take."""
        return sum(one.nbytes for one in list(self.loaded.values()))

    def table(self, one: LoadedLoRA) -> Tensor:
        """Return where a LoRA's updates lie, int64 (layers, 3), on the model's device."""
        updates = [layer.update(one) for layer in self.layers.values()]
        places = [(update.A.data_ptr(), update.B.data_ptr(), update.rank) for update in updates]
        return torch.tensor(places, device=self.model.wte.weight.device)

    def layer(self, name: str) -> MultiLoRALayer:
        """Return the layer at a path of the model, and wrap it first if no LoRA has adapted it yet."""
        if name not in self.layers:
            linear = self.model.get_submodule(name)
            wrapper = MultiLoRAExperts if experts_of(linear) else MultiLoRALinear
            empty = torch.empty(0, dtype=self.model.dtype, device=next(linear.parameters()).device)
            self.layers[name] = wrapper(linear, name, self.choice, len(self.layers), empty)
            self.model.set_submodule(name, self.layers[name])
        return self.layers[name]

    def style_of(self, number: int) -> PromptStyle:
        """Return the prompt style of a LoRA, or of the base alone."""
        return self.loaded[number].style if number else self.style

    def choose(self, numbers: Sequence[int]) -> None:
        """Choose the LoRA of each row that the model computes from now on."""
        if self.chosen == numbers:
            return
        for number in filter(None, numbers):
            self.loaded.move_to_end(number)
        self.chosen = list(numbers)
        self.choice.set([self.loaded[number] if number else None for number in numbers])
        for layer in self.layers.values() if self.choice.same else ():
            layer.only = layer.update(self.choice.loras[0])


def read(path: Path, base: BaseCheckpoint, mmap: bool = True) -> dict[str, Any]:
    """Read a LoRA file of this base. Raises UserError if it is not one."""
    return finetuned_file.read_file(path, lora.NAME, base.fingerprint, mmap)
