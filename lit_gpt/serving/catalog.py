"""What is served under which name: a base, and finetuned files that have been seen to change what it says."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.methods import lora
from lit_gpt.methods.finetuned_file import read_file
from lit_gpt.methods.finetuned_model import attach_record, method_of
from lit_gpt.methods.multi_lora import LoadedLoRA, LoRAPool
from lit_gpt.model.gpt import GPT
from lit_gpt.serving.adapters import Adapters, Stamp, stamp_of
from lit_gpt.serving.checks import files_in
from lit_gpt.serving.errors import APIError
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Served:
    """A model that requests may name.

    Attributes:
        style: how its conversations are rendered; None: its file has not been read.
        lora: its number in the pool; 0: none.
        method: how its file was trained; None: it is the base.
        distance: how far its next tokens are from the base's, in nats: the mean Kullback-Leibler divergence on a probe.
        path: of its file, if it is read when asked for; it stood as `stamp` says when it was.
        problem: why it cannot be used.
    """

    name: str
    style: PromptStyle | None
    lora: int = 0
    method: str | None = None
    distance: float | None = None
    path: Path | None = None
    stamp: Stamp | None = None
    problem: str | None = None

    @property
    def read_style(self) -> PromptStyle:
        """Return the style of a model whose file has been read."""
        assert self.style is not None
        return self.style


class Catalog:
    """The models that are served: one GPT, and what is told apart by its rows.

    Attributes:
        served: by name.
        fingerprint: of the base.
        adapters: the LoRAs that come and go; None: there are none.
        at_rest: calls a function while no row is computed.
    """

    def __init__(self, model: GPT, base: BaseCheckpoint, adapters: Adapters | None, served: Iterable[Served]) -> None:
        self.model, self.adapters, self.fingerprint = model, adapters, base.fingerprint
        self.tokenizer: Tokenizer = base.tokenizer
        self.served = {model.name: model for model in served}
        self.changing = threading.Lock()  # what is served
        self.at_rest: Callable[[Callable[[], Any]], Any] = lambda function: function()
        self.probe: Tensor | None = None  # what the base says, once it is asked
        self.folder: Path | None = None
        self.named: dict[str, Path] = {}  # files that were named at the start
        self.unloaded = set[str]()

    @classmethod
    def with_loras(
        cls,
        base: BaseCheckpoint,
        loras: Mapping[str, Path],
        style: PromptStyle | None,
        folder: Path | None = None,
        limit: int = 10**9,
        rows: int = 1,
        **place: Any,
    ) -> "Catalog":
        """Load a base, under its folder's name, and serve LoRA files beside it, under theirs.

        Args:
            style: in which all conversations are rendered; None: each in its own.
            folder: of more such files, which are read when they are asked for.
            limit: bytes that LoRAs may take together.
            rows: how many answers are continued together.
            place: dtype and device of the model.

        Raises:
            UsageError: a LoRA has the base's name.
            UserError: a file does not fit the base, or changes nothing.
        """
        own, name = style or base.prompt_style, name_of(base)
        if name in loras:
            raise UsageError(f"--loras {name}=...: is the base's own name; choose another")
        base = LoRAPool.fitting(base, [None, *loras.values()])
        pool = LoRAPool(base.build(**place), base, own, fixed=style is not None)
        named = (Served(lora_name, None, method=lora.NAME, path=path) for lora_name, path in loras.items())
        catalog = cls(pool.model, base, Adapters(pool, limit, rows), [Served(name, own), *named])
        for lora_name in loras:
            if problem := catalog.open(lora_name).problem:
                raise UserError(problem)
        catalog.named, catalog.folder = dict(loras), folder
        catalog.scan()
        return catalog

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
        served = self.served
        if name not in served:
            known = ", ".join(islice(served, 10)) + (f" and {len(served) - 10} more" if len(served) > 10 else "")
            raise APIError(404, f"model: '{name[:80]}' is not served; expected {known}", "model", "model_not_found")
        return served[name]

    async def ready(self, name: str) -> Served:
        """Return the model of a name as its file stands now, read if that is new.

        Raises:
            APIError: there is none, or its file cannot be used.
        """
        served = self.find(name)
        if served.path and self.adapters and (served.stamp is None or served.stamp != stamp_of(served.path)):
            served = await asyncio.wrap_future(self.adapters.reading.submit(self.open, name))
        if served.problem or served.style is None:
            raise unavailable(name)
        return served

    def open(self, name: str) -> Served:
        """Read a LoRA's file if it is not as it was read before, and compare it with the base."""
        served, adapters = self.find(name), self.adapters
        if served.path is None or adapters is None or served.stamp and served.stamp == stamp_of(served.path):
            return served
        new = replace(served, stamp=stamp_of(served.path), style=None, lora=0, distance=None, problem=None)
        try:
            one, stamp = adapters.read(served.path)
            number, distance = self.at_rest(partial(self.compared, one, served.path))
            adapters.files[number] = served.path, stamp
            new = replace(new, style=one.style, lora=number, distance=distance, stamp=stamp)
        except UserError as error:
            new = replace(new, problem=str(error))
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        with self.changing:
            stays = name in self.served
            self.served = {key: new if key == name else value for key, value in self.served.items()}
        for number in filter(None, (served.lora, 0 if stays else new.lora)):
            self.at_rest(partial(adapters.drop, number))
        return new

    def compared(self, one: LoadedLoRA, path: Path) -> tuple[int, float]:
        """Take a LoRA into memory, and return its number and distance. Raises UserError if it does not act."""
        assert self.adapters is not None
        pool, number = self.adapters.pool, self.adapters.add(one)
        if self.probe is None:
            pool.choose([0])
            self.probe = probe_logits(self.model)
        pool.choose([number])
        try:
            return number, checked_distance(self.probe, probe_logits(self.model), path)
        except UserError:
            pool.remove(number)
            raise
        finally:
            pool.choose([0])

    def load(self, name: str) -> Served:
        """Serve a LoRA of the folder, or one that was unloaded, from now on.

        Raises:
            APIError: there is no such file, or it cannot be used.
        """
        self.unloaded.discard(name)
        self.scan()
        served = self.open(name)
        if served.problem:
            raise unavailable(name)
        return served

    def unload(self, name: str) -> None:
        """Serve a LoRA no more until it is loaded. Raises APIError if there is none of this name."""
        if self.find(name).path is None:
            raise APIError(400, f"lora_name: '{name[:80]}' stays as long as the server", "lora_name")
        self.unloaded.add(name)
        self.scan()

    def scan(self) -> None:
        """Serve what is named, and what the folder holds now."""
        wanted = files_in(self.folder) if self.folder else {}
        wanted |= self.named
        with self.changing:
            before = self.served
            own = [one for one in before.values() if one.path is None]
            kept = {one.name: one for one in own}
            for name in wanted.keys() - self.unloaded - kept.keys():
                one = before.get(name)
                known = one is not None and one.path == wanted[name]
                kept[name] = one if one and known else Served(name, None, method=lora.NAME, path=wanted[name])
            order = [name for name in (*before, *wanted) if name in kept]
            self.served = {name: kept[name] for name in order}
            gone = {one.lora for one in before.values()} - {one.lora for one in kept.values()}
        if self.adapters:
            for number in gone:
                self.at_rest(partial(self.adapters.drop, number))

    def choose(self, rows: list[DecodingRow]) -> None:
        """Have the model compute these rows, each as its own model does."""
        if self.adapters:
            self.adapters.pool.choose([row.lora for row in rows])


def unavailable(name: str) -> APIError:
    """Return the error for a LoRA whose file cannot be used as it is."""
    told = f"model: '{name[:80]}' cannot be used now; the server's log says why"
    return APIError(503, told, "model", "model_unavailable", retry_after=1)


def name_of(base: BaseCheckpoint) -> str:
    return base.checkpoint_dir.resolve().name


@torch.no_grad()
def probe_logits(model: GPT) -> Tensor:
    """Return the logits that follow each of some tokens from all over the vocabulary, (PROBE_TOKENS, vocabulary)."""
    n = min(PROBE_TOKENS, model.config.block_size - len(model.virtual_tokens))
    ids = torch.cat(
        (torch.tensor(model.virtual_tokens).long(), torch.linspace(0, model.config.vocab_size - 1, n).long())
    )
    return model(ids.unsqueeze(0).to(model.wte.weight.device))[0, -n:, : model.config.vocab_size].float()


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
