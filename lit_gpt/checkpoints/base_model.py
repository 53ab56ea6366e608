"""The base: a converted checkpoint's weights as they are to be used, as they are stored or quantized.

Quantizing goes tensor by tensor, from the mapped file to what is kept, so that a model never needs its full size.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints import io
from lit_gpt.distributed.placement import Placement, Where
from lit_gpt.errors import UsageError, UserError
from lit_gpt.hardware import gathered, on_meta, page_out
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, quantize
from lit_gpt.quantization import formats
from lit_gpt.quantization.modules import Quantized
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer


def skeleton(config: Config, dtype: torch.dtype | None, format: str | None) -> GPT:
    """Return a GPT without contents, quantized if a format is given."""
    with on_meta():
        model = GPT(config).to(dtype)
        return quantize(model, format) if format else model


def build_model(
    config: Config,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: Where | None = None,
    source: Path | str = "the state dict",
    quantized: str | None = None,
) -> GPT:
    """Return a GPT that holds the given tensors, in evaluation mode.

    Args:
        source: names the tensors in errors.
        quantized: the format that the tensors are in, if they are quantized.

    Raises:
        UserError: missing or unexpected names, or shapes that the configuration contradicts.
    """
    model = skeleton(config, dtype, quantized)
    if config.tie_embeddings:
        tied = {name.replace("wte.", "lm_head."): tensor for name, tensor in state.items() if name.startswith("wte.")}
        state = {**state, **tied}
    expected = model.state_dict()
    io.check_state(expected, state, source)
    # a quantized layer has tensors of dtypes that the model's does not bear on
    cast = {
        name: tensor.to(device_of(name, config, device), expected[name].dtype if dtype else None)
        for name, tensor in state.items()
    }
    model.load_state_dict(cast, strict=True, assign=True)
    model.tie_weights()
    if isinstance(device, Placement):
        device.apply(model)
    return model.eval()


def device_of(name: str, config: Config, device: Where | None) -> torch.device | None:
    """Return where the tensor of a name is to lie; None: where it does."""
    if isinstance(device, Placement):
        return device.device_of(name, config)
    return torch.device(device) if device else None


@dataclass(frozen=True)
class BaseCheckpoint:
    """Holds a converted checkpoint, opened as it is to be used: config, mapped tensors, tokenizer, prompt style."""

    checkpoint_dir: Path
    config: Config
    state: Mapping[str, Tensor]
    fingerprint: str  # identifies the weights before they were quantized
    quantize: str | None = None  # a format of lit_gpt.quantization.formats
    is_quantized: bool = False  # the file is quantized already
    codes_fingerprint: str | None = None  # identifies a calibrated file, whose codes are not just the nearest
    resident: bool = False  # whether a CPU holds the weights gathered in memory; else they stay mapped from the file

    @classmethod
    def open(cls, checkpoint_dir: Path, quantize: str | None = None, resident: bool = False) -> "BaseCheckpoint":
        """Open the checkpoint in a folder, to be quantized to a format if one is given.

        Args:
            resident: for answers, which a CPU then decodes faster; see lit_gpt.hardware.gathered.

        Raises:
            UsageError: the folder is quantized already.
            UserError: it is no converted checkpoint, or its weights are not those that were calibrated.
        """
        checkpoint.check_checkpoint_dir(checkpoint_dir)
        record = checkpoint.quantization(checkpoint_dir)
        state, config = checkpoint.read_state(checkpoint_dir), Config.from_checkpoint(checkpoint_dir)
        if not record:
            own = checkpoint.stretched(checkpoint_dir, checkpoint.fingerprint(state))
            base = cls(Path(checkpoint_dir), config, state, own, quantize, resident=resident)
            for tensor in state.values() if quantize else ():
                page_out(tensor)
            return base
        if quantize:
            raise UsageError(
                f"--quantize {quantize}: {checkpoint_dir} is quantized already ({record['quantize']}); leave the flag "
                "out, or give the folder that it was made from"
            )
        calibrated = record.get("codes")
        if calibrated and calibrated != checkpoint.fingerprint(state):
            raise UserError(
                f"{Path(checkpoint_dir) / 'lit_model.pth'}: not the weights that lit_quantize.json tells of; "
                "quantize again"
            )
        source, format = record["source"], record["quantize"]
        return cls(Path(checkpoint_dir), config, state, source, format, True, calibrated, resident)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read the folder's tokenizer, when first asked for."""
        return Tokenizer(self.checkpoint_dir)

    @cached_property
    def prompt_style(self) -> PromptStyle:
        """Read the folder's prompt style, when first asked for."""
        return PromptStyle.from_checkpoint(self.checkpoint_dir, self.tokenizer)

    @property
    def quantization(self) -> str | None:
        """Return what a finetuned file records of its base: the format, and with calibration the fingerprint."""
        return f"{self.quantize}:{self.codes_fingerprint}" if self.codes_fingerprint else self.quantize

    def quantized_as(self, trained_on: str | None, path: Path) -> "BaseCheckpoint":
        """Return this base, quantized as a finetuned file's was; a file that was trained on full weights takes any.

        Args:
            trained_on: the `quantization` of the file's base.

        Raises:
            UserError: this base is quantized otherwise, or is to be.
        """
        if trained_on is None or trained_on == self.quantization:
            return self
        name, _, calibrated = trained_on.partition(":")
        if calibrated:
            raise UserError(
                f"{path}: trained on the {name} checkpoint of fingerprint {calibrated}, which "
                f"--checkpoint_dir {self.checkpoint_dir} is not; give the folder that scripts/quantize.py wrote"
            )
        if self.quantize is None:
            return replace(self, quantize=name)
        where = f"--checkpoint_dir {self.checkpoint_dir} is" if self.is_quantized else "--quantize asks for"
        here, mend = (
            (f"calibrated {name}", "the folder that it was made from")
            if self.codes_fingerprint
            else (self.quantize, name)
        )
        raise UserError(f"{path}: trained on a base in {name}, and {where} {here}; use {mend}")

    def build(self, dtype: torch.dtype | None = None, device: Where | None = None) -> GPT:
        """Return the model, in evaluation mode; see load_model. Of a placement each layer lies on its own device."""
        on_cpu = (device if isinstance(device, Placement) else torch.device(device or "cpu")).type == "cpu"
        if on_cpu and dtype == torch.float16:
            print(
                "fp16 on a CPU is many times slower than bf16 or fp32, and meant for GPUs without bf16; take "
                "--precision bf16 or fp32",
                file=sys.stderr,
            )
        if self.quantize:
            dtype = dtype or self.dtype
        state: Mapping[str, Tensor] = self.state
        if self.quantize and dtype and not self.is_quantized:
            tensors = self.quantized(dtype, device)
            layout = skeleton(self.config, dtype, self.quantize).state_dict()
            state = gathered(tensors, layout) if self.resident and on_cpu else dict(tensors)
        elif self.resident and on_cpu and dtype in (None, self.dtype):  # else each model casts them
            state = self._gathered
        return build_model(self.config, state, dtype, device, self.checkpoint_dir / "lit_model.pth", self.quantize)

    @cached_property
    def _gathered(self) -> Mapping[str, Tensor]:
        """Copy the stored weights, once for all models."""
        return gathered(self.state.items(), self.state)

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored dtype of the weights that are not quantized; a damaged file may lack them."""
        if "ln_f.weight" in self.state:
            return self.state["ln_f.weight"].dtype
        embedding = (tensor for name, tensor in self.state.items() if name.startswith("wte."))  # norms have no weights
        return next((tensor.dtype for tensor in embedding if tensor.is_floating_point()), torch.get_default_dtype())

    def quantized(self, dtype: torch.dtype, device: Where | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the state dict of the quantized model, tensor by tensor; what is not quantized comes as it is stored.

        Raises:
            UserError: weights that are not numbers.
        """
        layers = dict(skeleton(self.config, dtype, self.quantize).named_modules())
        for name, tensor in self.state.items():
            path, _, kind = name.rpartition(".")
            layer = layers.get(path)
            if kind != "weight" or not isinstance(layer, Quantized):
                yield name, tensor
                continue
            where = device_of(name, self.config, device)
            encoded = formats.encode(tensor, layer.format, dtype, where, done=page_out)
            if not all(part.isfinite().all() for part in encoded.values() if part.is_floating_point()):
                raise UserError(f"{self.checkpoint_dir / 'lit_model.pth'}: {name} holds values that are not numbers")
            yield from ((f"{path}.{key}", part) for key, part in encoded.items())

    def write_quantized(self, folder: Path, tensors: Iterable[tuple[str, Tensor]], own_codes: bool) -> None:
        """Write the tensors of a quantized model into a checkpoint folder that has all but the weights.

        Args:
            own_codes: whether they are others than rounding to the nearest gives.
        """
        layout = skeleton(self.config, self.dtype, self.quantize).state_dict()
        for name in [name for name in layout if name.startswith("wte.")] if self.config.tie_embeddings else ():
            del layout[name.replace("wte.", "lm_head.")]
        path = folder / "lit_model.pth"
        io.write_streamed(path, layout, tensors)
        record = {"format_version": checkpoint.QUANTIZED_VERSION, "quantize": self.quantize, "source": self.fingerprint}
        if own_codes:
            record["codes"] = checkpoint.fingerprint(io.load(path))
        (folder / "lit_quantize.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_model(
    checkpoint_dir: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
) -> GPT:
    """Load the model of a converted checkpoint folder, in evaluation mode.

    Args:
        dtype: what the weights are cast to; None: they stay as stored.
        device: None: the CPU, where weights kept in the stored dtype stay mapped from the file.
        quantize: a format of lit_gpt.quantization.formats, for a folder that is not quantized already.

    Raises:
        UserError: the folder is not a converted checkpoint, or its files are damaged or do not fit together.
    """
    return BaseCheckpoint.open(checkpoint_dir, quantize).build(dtype, device)
