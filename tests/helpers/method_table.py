"""Make the tables of tutorials/methods.md by trying; run as a module, with PYTHONPATH=.:tests, to print them."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from helpers.methods import EVERYTHING, METHODS, PROMPTS, attach_fresh, make
from helpers.methods import OTHERS as OTHER_METHODS
from helpers.tiny_models import model_of
from lit_gpt import GPT
from lit_gpt.conversion.peft import lora as peft_lora
from lit_gpt.conversion.peft import others as peft_others
from lit_gpt.errors import UserError
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.generation.steps.tape import Unsupported
from lit_gpt.methods import finetuned_file, lora
from lit_gpt.model.gpt import quantize
from lit_gpt.model.packed_inputs import Targets

UPDATES, INITS = (
    ("plain", "dora", "vera", "tied", "multi", "qa", "glora"),
    ("kaiming", "gaussian", "pissa", "olora", "eva"),
)
OTHERS = {"scaling": "sqrt_r", "train": "B", "lr_ratio": 16}


def what_works(folder: Path) -> str:
    """Return the table of what each method goes with; small models are made in a folder."""
    plain = model_of("llama", "llama3", folder / "llama").state_dict()
    layouts = {name: model_of(family, name, folder / name).config for family, name in
               (("llama", "llama3"), ("mixtral", "mixtral"))}  # fmt: skip

    def model(name: str, layout: str = "llama3", format: str | None = None, **settings) -> GPT:
        base = GPT(layouts[layout])
        if layout == "llama3":
            base.load_state_dict(plain)
        return attach_fresh(quantize(base, format) if format else base, name, **settings).eval()

    columns: dict[str, Callable[[str], object]] = {
        "quantized base": lambda name: step(model(name, format="nf4")),
        "experts": lambda name: step(attach_strictly(GPT(layouts["mixtral"]), name)),
        "fast decoding": lambda name: NativeStep(model(name)),
        "several in a batch": lambda name: several(model(name), name),
        "merge": lambda name: make(name).merge(model(name)),
        "PEFT out": lambda name: exported(model(name), name),
        "fsdp, deepspeed": lambda name: sharded(name),
    }
    rows = [[name, *(works(attempt, name) for attempt in columns.values())] for name in (*METHODS, *PROMPTS)]
    return table(["method", *columns], rows)


def what_combines() -> str:
    """Return the table of the values of LoRA's flags that can be combined."""

    def combines(update: str, **settings) -> str:
        return works(lambda _: replace(EVERYTHING, update=update, **settings), "")

    columns = [{"init": init} for init in INITS] + [{name: value} for name, value in OTHERS.items()]
    names = [f"`{name} {value}`" for column in columns for name, value in column.items()]
    rows = [[f"`update {update}`", *(combines(update, **column) for column in columns)] for update in UPDATES]
    return table(["", *names], rows)


def works(attempt: Callable[[str], object], name: str) -> str:
    try:
        attempt(name)
    except (UserError, Unsupported):
        return "no"
    return "yes"


def attach_strictly(model: GPT, name: str) -> GPT:
    """Attach a method to the experts too, whatever it says."""
    return make(name).attach(model)


def step(model: GPT) -> None:
    idx = torch.arange(9).unsqueeze(0)
    model.train()(idx, targets=Targets(torch.arange(8), idx[0, 1:])).backward()


def settings_of(name: str) -> lora.LoRAConfig:
    if name in (*OTHER_METHODS, *PROMPTS):
        raise UserError("no LoRA")
    return replace(EVERYTHING, **METHODS[name])


def several(model: GPT, name: str) -> None:
    list(lora.updates(lora.skeleton(model.config, settings_of(name)), finetuned_file.trained_state(model), "file"))


def exported(model: GPT, name: str) -> None:
    method = make(name).name
    with tempfile.TemporaryDirectory() as folder:
        if method == lora.NAME:
            peft_lora.write(Path(folder), model, settings_of(name), "base")
        else:
            peft_others.write(Path(folder), model, method, "base", Path("file"))


def sharded(name: str) -> None:
    method = make(name)
    if method.unsharded:
        raise UserError(method.unsharded)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(what_works(Path(place)))
    print(what_combines())
