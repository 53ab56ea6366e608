"""The base: a converted checkpoint's weights as they are to be used, as they are stored or quantized.

Quantizing goes tensor by tensor, from the mapped file to what is kept, so that a model never needs its full size.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lit_gpt import checkpoint, quantize
from lit_gpt.config import Config
from lit_gpt.errors import UsageError, UserError
from lit_gpt.memory import release
from lit_gpt.meta import on_meta
from lit_gpt.model import GPT


@dataclass(frozen=True)
class Base:
    """A converted checkpoint, its tensors mapped from the file."""

    checkpoint_dir: Path
    config: Config
    state: Mapping[str, Tensor]
    fingerprint: str  # of the weights before they were quantized
    quantize: str | None = None  # a format of lit_gpt.quantize
    stored: bool = False  # the file is quantized already

    @classmethod
    def of(cls, checkpoint_dir: Path, quantize: str | None = None) -> "Base":
        """The base in a folder, to be quantized to a format if one is given.

        Raises:
            UsageError: the folder is quantized already.
            UserError: it is no converted checkpoint.
        """
        state, config = checkpoint.load_state(checkpoint_dir, quantized=True), Config.from_checkpoint(checkpoint_dir)
        found = checkpoint.quantization(checkpoint_dir)
        if not found:
            base = cls(Path(checkpoint_dir), config, state, checkpoint.fingerprint(state), quantize)
            for tensor in state.values() if quantize else ():
                release(tensor)
            return base
        if quantize:
            raise UsageError(
                f"--quantize {quantize}: {checkpoint_dir} is quantized already ({found['quantize']}); leave the flag "
                "out, or give the folder that it was made from"
            )
        return cls(Path(checkpoint_dir), config, state, found["source"], found["quantize"], stored=True)

    def as_trained(self, trained_on: str | None, path: Path) -> "Base":
        """This base, quantized as a finetuned file has it; one that was trained on full weights takes any.

        Raises:
            UserError: this one is to be quantized otherwise.
        """
        if trained_on and self.quantize not in (None, trained_on):
            where = f"--checkpoint_dir {self.checkpoint_dir} is" if self.stored else "--quantize asks for"
            raise UserError(f"{path}: trained on a base in {trained_on}, and {where} {self.quantize}; use {trained_on}")
        return replace(self, quantize=self.quantize or trained_on)

    def build(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> GPT:
        """The model, in evaluation mode; see GPT.from_checkpoint."""
        source = self.checkpoint_dir / "lit_model.pth"
        if not self.quantize:
            return checkpoint.build(self.config, dict(self.state), dtype, device, source)
        dtype = dtype or self.dtype
        state = dict(self.state if self.stored else self.quantized(dtype, device))
        return checkpoint.build(self.config, state, dtype, device, source, self.attach)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not quantized, as stored."""
        return self.state["ln_f.weight"].dtype

    def attach(self, model: GPT) -> GPT:
        return quantize.attach(model, self.quantize)

    def skeleton(self, dtype: torch.dtype) -> GPT:
        with on_meta():
            return self.attach(GPT(self.config).to(dtype))

    def quantized(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Iterator[tuple[str, Tensor]]:
        """The state dict of the quantized model, tensor by tensor; what is not quantized comes as it is stored.

        Raises:
            UserError: weights that are not numbers.
        """
        modules = dict(self.skeleton(dtype).named_modules())
        for name, tensor in self.state.items():
            path, _, kind = name.rpartition(".")
            module = modules.get(path)
            if kind != "weight" or not isinstance(module, quantize.Quantized):
                yield name, tensor
                continue
            found = quantize.encode(tensor, module.format, dtype, device and torch.device(device), done=release)
            if not all(part.isfinite().all() for part in found.values() if part.is_floating_point()):
                raise UserError(f"{self.checkpoint_dir / 'lit_model.pth'}: {name} holds values that are not numbers")
            yield from ((f"{path}.{key}", part) for key, part in found.items())

    def write_quantized(self, folder: Path) -> None:
        """Write the quantized model into a checkpoint folder that has all but the weights."""
        layout = self.skeleton(self.dtype).state_dict()
        for name in [name for name in layout if name.startswith("wte.")] if self.config.tie_embeddings else ():
            del layout[name.replace("wte.", "lm_head.")]
        checkpoint.write_streamed(folder / "lit_model.pth", layout, self.quantized(self.dtype))
        record = {"format_version": checkpoint.QUANTIZED_VERSION, "quantize": self.quantize, "source": self.fingerprint}
        (folder / "lit_quantize.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
