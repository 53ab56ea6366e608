"""What leaves the toolkit: a folder for transformers, a PEFT adapter, a GGUF file, a merged checkpoint.

Each is written into a temporary folder, read back, compared with its source on reference prompts (parity.py) and put in
place with the figures (export.json) and a card, or refused and not put in place.

Memory: weights stay mapped from their files, on both sides, and are widened layer by layer. A comparison holds the
largest layer in float32 and the golden logits twice; a shard is written from the mapped file, but for layers that
transformers has in another order (2 GB). The reader of a GGUF file holds its weights once, in 16 or 32 bits.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt import files
from lit_gpt.checkpoints import base_model
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion import hf, logits, model_card, parity, peft, readers
from lit_gpt.methods import finetuned_file, finetuned_model, lora
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer, has_tokenizer


@dataclass
class Source:
    """What is to be exported: a checkpoint, with what a finetuned file adds to it."""

    checkpoint_dir: Path
    adapter: Path | None
    state: dict[str, Tensor]  # of the base, mapped from its file
    base: str  # its fingerprint
    model: GPT
    record: dict[str, Any] | None  # of the finetuned file
    own: readers.LitReader
    golden: parity.Reference

    @classmethod
    def of(cls, checkpoint_dir: Path, adapter: Path | None = None, quantized: bool = False) -> "Source":
        """The checkpoint, or with `quantized` as the file's base was. Raises UserError if one cannot be used."""
        if not quantized:
            checkpoint.refuse_quantized(checkpoint_dir)
        source, record, style = BaseCheckpoint.open(checkpoint_dir), None, None
        if adapter:
            record = finetuned_file.read_file(adapter, lora.NAME, source.fingerprint)
            style = PromptStyle.from_dict(record["prompt_style"])
            source = source.quantized_as(record.get("quantize"), adapter) if quantized else source
        model, state, base = source.build(), dict(source.state), source.fingerprint
        if adapter:
            finetuned_model.attach_record(model, adapter, record)
            model.eval()
        own = readers.LitReader.of(checkpoint_dir, model, style)
        if own.tokenizer is None:
            print(f"{checkpoint_dir}: holds no tokenizer, so only logits are compared")
        return cls(checkpoint_dir, adapter, state, base, model, record, own, parity.Reference.of(own))

    @property
    def run_dir(self) -> Path:
        """Where the finetune left its records."""
        return self.adapter.parent if self.adapter else self.checkpoint_dir

    def write_prompt(self, folder: Path, stops: bool = True) -> None:
        if self.own.style and self.own.tokenizer:
            self.own.style.write_template(folder, self.own.tokenizer)
            if stops:
                self.own.style.write_stops(folder)

    def finish(
        self, folder: Path, out_dir: Path, found: dict[str, Any], use: str, library: str, **figures: Any
    ) -> None:
        """Write the card and the figures into an export that has passed."""
        template = self.own.style.template if self.own.style else None
        made_from = model_card.provenance(self.checkpoint_dir, self.base, template, self.adapter)
        figures = {**figures, **found, **made_from}
        model_card.write(folder, out_dir.resolve().name, self.checkpoint_dir, self.run_dir, use, library, figures)


def to_hf(checkpoint_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Export a converted checkpoint as a folder that transformers loads. Returns the figures of its comparison."""
    with files.new_folder(out_dir) as folder:
        source = Source.of(checkpoint_dir)
        hf.export(checkpoint_dir, folder, source.state)
        source.write_prompt(folder)
        what, packages = f"the export of {checkpoint_dir}", ("transformers",)
        reader = readers.read_back(what, packages, lambda: readers.read_hf(folder), lambda: readers.own_hf(folder))
        found = source.golden.compare(reader, what)
        use = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{out_dir.name}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{out_dir.name}")'
        )
        source.finish(folder, out_dir, found, use, "transformers", format="hf")
    return found


def to_gguf(checkpoint_dir: Path, out_dir: Path, dtype: str | None) -> dict[str, Any]:
    """Export a converted checkpoint as a file that llama.cpp loads. Returns the figures of its comparison.

    Args:
        dtype: of the matrices, a key of gguf.writer.KINDS; None: as the checkpoint's.
    """
    from lit_gpt.conversion.gguf import writer

    with files.new_folder(out_dir) as folder:
        source, config = Source.of(checkpoint_dir), Config.from_checkpoint(checkpoint_dir)
        dtype = dtype or writer.NAMES[source.state["wte.weight"].dtype]
        path = folder / f"{config.name}-{dtype.upper()}.gguf"
        layout = writer.write(path, checkpoint_dir, source.state, dtype, source.own.style)
        if config.sliding_window and not layout.keeps_window:
            print(f"llama.cpp keeps no window for it: the context is cut to {config.sliding_window} tokens")
            source.golden = parity.Reference.of(source.own, min(config.sliding_window, parity.LENGTH))
        what = f"the export of {checkpoint_dir}"
        stored = {writer.NAMES.get(tensor.dtype) for tensor in source.state.values()}
        read_as = torch.float32 if "f32" in stored else writer.READ_AS[dtype]
        if layout.unread:
            print(f"{what}: transformers' reader of GGUF {layout.unread}; read back by Lit-GPT itself")
            reader = readers.own_gguf(path, config, read_as)
        else:
            reader = readers.read_back(
                what,
                ("transformers",),
                lambda: readers.read_gguf(path, checkpoint_dir, read_as),
                lambda: readers.own_gguf(path, config, read_as),
            )
        exact = dtype == "f32" or stored == {dtype}
        rounding = () if exact else (writer.TOLERANCE[dtype], f"that rounding to {dtype} explains")
        found = source.golden.compare(reader, what, *rounding)
        use = f'from llama_cpp import Llama\n\nmodel = Llama("{out_dir.name}/{path.name}")'
        source.finish(folder, out_dir, found, use, "gguf", format="gguf", dtype=dtype)
    return found


def merge(checkpoint_dir: Path, lora_path: Path, out_dir: Path) -> float:
    """Fold a LoRA file into its base: a checkpoint folder. Returns how far its logits are off, by their norm."""
    with files.new_folder(out_dir) as folder:
        source = Source.of(checkpoint_dir, lora_path, quantized=True)
        lora.write_merged(folder / "lit_model.pth", source.model)
        (folder / "lit_config.json").write_text(lora.merged_config(source.model).to_json())
        hf.copy_side_files(checkpoint_dir, folder)
        PromptStyle.from_dict(source.record["prompt_style"]).save(folder)
        model_card.copy_run(lora_path.parent, folder)
        what, packages = f"the merge of {lora_path}", ("transformers",)
        reader = readers.read_back(what, packages, lambda: readers.read_lit(folder), lambda: own_checkpoint(folder))
        base = BaseCheckpoint.open(checkpoint_dir).quantized_as(source.record.get("quantize"), lora_path).build()
        without = logits.float32_logits(base, source.golden.idx)
        found = source.golden.compare(reader, what, *logits.rounding(source.model.dtype), base=without)
        use = f'from lit_gpt import load_model\n\nmodel = load_model("{out_dir.name}")'
        source.finish(folder, out_dir, found, use, "lit-gpt", format="merged")
    return found["logits_difference"]


def own_checkpoint(folder: Path) -> readers.LitReader:
    return readers.LitReader.of(folder, load_model(folder))


def to_peft(checkpoint_dir: Path, lora_path: Path, out_dir: Path) -> dict[str, Any]:
    """Export a LoRA file as an adapter that `PeftModel.from_pretrained` loads. Returns the figures.

    It goes onto the base as that is stored. Where it was trained on a quantized one, that moves its logits, by how much
    is among the figures.
    """
    with files.new_folder(out_dir) as folder:
        source = Source.of(checkpoint_dir, lora_path)
        base = model_card.repository(checkpoint_dir) or str(checkpoint_dir)
        peft.write(folder, source.model, lora.LoRAConfig(**source.record["hyperparameters"]), base)
        hf.copy_side_files(checkpoint_dir, folder, hf.TOKENIZER_FILES)
        source.write_prompt(folder, stops=False)  # an adapter goes by its base's generation_config.json
        what = f"the export of {lora_path}"
        reader = read_adapter(what, source, folder)
        found = source.golden.compare(reader, what) | moved_by_full_weights(source)
        use = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
            f'model = PeftModel.from_pretrained(base, "{out_dir.name}")'
        )
        source.finish(folder, out_dir, found, use, "peft", format="peft")
    return found


def moved_by_full_weights(source: Source) -> dict[str, Any]:
    """For an adapter that was trained on a quantized base: how far its logits are off on full weights."""
    trained_on = source.record.get("quantize")
    if not trained_on:
        return {}
    trained = Source.of(source.checkpoint_dir, source.adapter, quantized=True).golden.logits
    moved = logits.difference(source.golden.logits, trained)
    print(
        f"{source.adapter}: trained on a base in {trained_on}; on the base as it is stored, which PEFT gives it, its "
        f"logits differ by {moved:.1e} of their norm. scripts/merge_lora.py keeps the base that it was trained on"
    )
    return {"trained_on": trained_on, "logits_difference_from_training": moved}


def read_adapter(what: str, source: Source, folder: Path) -> readers.Reader:
    """A PEFT adapter on the source's base, by PEFT where it is installed."""
    return readers.read_back(
        what,
        ("transformers", "peft"),
        lambda: readers.read_peft(source.checkpoint_dir, source.state, folder),
        lambda: own_adapter(source, folder),
    )


def own_adapter(source: Source, folder: Path) -> readers.LitReader:
    config = Config.from_checkpoint(source.checkpoint_dir)
    model = base_model.build_model(config, source.state, source=source.checkpoint_dir)
    settings, state, _ = peft.read(folder, config, source.state)
    finetuned_file.load_trained(lora.attach(model, settings), state, folder)
    return readers.LitReader.of(folder, model.eval())


def from_peft(peft_dir: Path, checkpoint_dir: Path, out_dir: Path) -> lora.LoRAConfig:
    """Take in a PEFT adapter: `out_dir` gets the file that finetune/lora.py would have left. Returns its settings.

    The prompt style is that of the adapter's own chat template if it has one, else the checkpoint's.

    Raises:
        UserError: it has what is not supported, is for another base, or its logits under PEFT are others.
    """
    base = checkpoint.load_state(checkpoint_dir)
    settings, state, remarks = peft.read(peft_dir, Config.from_checkpoint(checkpoint_dir), base)
    with files.new_folder(out_dir) as folder:
        print("".join(f"{remark}\n" for remark in remarks), end="")
        own = has_tokenizer(peft_dir)
        templates = own and Tokenizer(peft_dir).chat_template is not None
        speaks = peft_dir if templates else checkpoint_dir
        style = PromptStyle.from_checkpoint(speaks, Tokenizer(speaks))
        path = folder / f"lit_model_{lora.NAME}_finetuned.pth"
        record = {"hyperparameters": asdict(settings), "prompt_style": style.to_dict()}
        finetuned_file.save_file(path, lora.NAME, checkpoint.fingerprint(base), state, **record)
        source = Source.of(checkpoint_dir, path)
        golden = source.golden if own else replace(source.golden, ids=[None] * len(source.golden.ids))
        golden = golden if templates else replace(golden, prompts=[None] * len(golden.prompts))
        what = f"the adapter in {peft_dir}"
        reader = read_adapter(what, source, peft_dir)
        golden.compare(reader, what)
    return settings
