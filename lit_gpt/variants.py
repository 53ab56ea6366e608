"""What LoRA, Adapter and Adapter v2 have in common: which parameters train, and the file that holds them.

A method is a module with METHOD (its name), CONFIG (a dataclass of its hyperparameters) and `attach(model, config)`,
which extends a base GPT in place and can follow another method's. Each module that it adds names its own parameters
that train in `trained_parameters`.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt import zero
from lit_gpt.base import Base
from lit_gpt.checkpoint import DTYPES, FORMAT_VERSION, check_state, load, save
from lit_gpt.errors import UserError
from lit_gpt.model import GPT

METHODS = ("lora", "adapter", "adapter_v2")
RECORD = {"format_version", "method", "base", "state", "hyperparameters", "prompt_style"}


@dataclass(frozen=True)
class Method:
    """How a finetune script trains: what it does to the base, and what of it is kept."""

    name: str
    attach: Callable[[GPT], GPT]  # from the base to the model to train, in place
    settings: dict[str, Any] = field(default_factory=dict)  # hyperparameters, from which it can be attached again
    whole_model: bool = False  # the base's own weights train, and the result is a checkpoint folder
    quantize: str | None = None  # how the base is quantized

    def stored(self, hp: SimpleNamespace) -> torch.dtype:
        """The dtype in which the base's weights are kept: what trains in float32, unless asked for otherwise."""
        return torch.float32 if self.whole_model and hp.master_weights else DTYPES[hp.precision]

    def arithmetic(self, hp: SimpleNamespace, device: str) -> torch.autocast:
        """The context of a forward pass: arithmetic in the run's precision, if the weights are of another.

        Without a cache of weights that were cast: each is used once, and together they would take half the weights'
        room again.
        """
        dtype = DTYPES[hp.precision]
        return torch.autocast(device, dtype, enabled=self.stored(hp) != dtype, cache_enabled=False)

    @classmethod
    def of(cls, module: ModuleType, config: Any) -> "Method":
        return cls(module.METHOD, partial(module.attach, config=config), asdict(config))


def train_only_what_is_attached(model: nn.Module) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        for name in getattr(module, "trained_parameters", ()):
            module.get_parameter(name).requires_grad_(True)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What trains: the only tensors that a finetuned file holds."""
    return {name: whole(p).detach() for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each rank holds a share, if it is one. All ranks must ask together."""
    if zero.shared_out(tensor):
        return zero.whole(tensor)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_like(parameter: Tensor, contents: Tensor) -> Tensor:
    """This rank's share of a whole tensor, if the parameter is shared among ranks; else the tensor."""
    if not hasattr(parameter, "full_tensor"):
        return contents
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(contents.to(parameter.device), parameter.device_mesh, parameter.placements)


def load_trained(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy a finetuned file's tensors into the parameters that train.

    Raises:
        UserError: the names or shapes differ.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_state(parameters, state, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if zero.shared_out(parameter):
                zero.put(parameter, state[name])
            else:
                parameter.copy_(shared_like(parameter, state[name]))


def file_contents(method: str, base: str, state: Mapping[str, Tensor], **record: Any) -> dict[str, Any]:
    """What was trained, with all that is needed to use it on its base, of that fingerprint, and on no other."""
    contents = {"format_version": FORMAT_VERSION, "method": method, "base": base, **record}
    return {**contents, "state": {name: tensor.cpu().contiguous() for name, tensor in state.items()}}


def save_file(path: Path, method: str, base: str, state: Mapping[str, Tensor], **record: Any) -> None:
    save(path, file_contents(method, base, state, **record))


def read_file(path: Path, method: str | None, base: str) -> dict[str, Any]:
    """The contents of a finetuned file; method None admits any.

    Raises:
        UserError: not such a file, of another method or format version, or trained on another base.
    """
    contents = load(path)
    if not contents.keys() >= RECORD:
        raise UserError(f"{path}: not a finetuned file; expected what finetune/{method or METHODS[0]}.py writes")
    if contents["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format version {contents['format_version']}, expected {FORMAT_VERSION}")
    admitted = (method,) if method else METHODS
    if contents["method"] not in admitted:
        raise UserError(f"{path}: trained by the method {contents['method']}, expected {' or '.join(admitted)}")
    if contents["base"] != base:
        raise UserError(
            f"{path}: trained on another base (fingerprint {contents['base']}) than that of --checkpoint_dir ({base})"
        )
    return contents


def attach_file(model: nn.Module, path: Path, method: str | None, base: str) -> dict[str, Any]:
    """Attach what a finetuned file holds to `model`, which must be the base that it was trained on.

    Args:
        base: the fingerprint of the base's state dict.

    Returns:
        The file's record: hyperparameters, prompt style and so on.

    Raises:
        UserError: as `read_file`, or the file's tensors contradict its own hyperparameters.
    """
    record = read_file(path, method, base)
    attach_record(model, path, record)
    return record


def attach_record(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
    """Attach what `read_file` found; errors as `attach_file`'s."""
    method_module(record["method"]).attach(model, hyperparameters(record, path))
    load_trained(model, record["state"], path)


def hyperparameters(record: dict[str, Any], path: Path) -> Any:
    """Of the method whose file `read_file` has read; errors as `attach_file`'s."""
    try:
        return method_module(record["method"]).CONFIG(**record["hyperparameters"])
    except TypeError as error:
        raise UserError(f"{path}: not the hyperparameters of a {record['method']} file ({error})") from None


def load_model(
    checkpoint_dir: Path,
    path: Path,
    method: str | None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: str | None = None,
) -> tuple[GPT, dict[str, Any]]:
    """The model of a converted checkpoint with what a finetuned file holds attached, and the file's record.

    Args:
        quantize: a format for the base. None: that which the file was trained on.

    Raises:
        UserError: as `attach_file`, or the base is quantized in another way than the one that was trained on.
    """
    base = Base.of(checkpoint_dir, quantize)
    record = read_file(path, method, base.fingerprint)
    base = base.as_trained(record.get("quantize"), path)
    model = base.build(dtype, device)
    attach_record(model, path, record)
    return model.eval(), record


def method_module(method: str) -> ModuleType:
    return importlib.import_module(f"lit_gpt.{method}")
