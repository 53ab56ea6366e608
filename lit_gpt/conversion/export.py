"""Write what leaves the toolkit: a folder for transformers, a PEFT adapter, a GGUF file, a merged checkpoint.

Each is written into a temporary folder, read back, compared with its source on reference prompts (parity.py) and put in
place with the figures (export.json) and a card, or refused and not put in place.

Memory: weights stay mapped from their files, on both sides, and become float32 layer by layer. A comparison holds the
largest layer in float32 and the reference logits twice; a shard is written from the mapped file, but for layers that
transformers has in another order (2 GB). The reader of a GGUF file holds its weights once, in 16 or 32 bits.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lit_gpt import files
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion import hf, logits, model_card, parity, readers, towers
from lit_gpt.conversion.peft import lora as peft_lora
from lit_gpt.conversion.peft import others as peft_others
from lit_gpt.errors import UserError
from lit_gpt.methods import finetuned_file, finetuned_model, lora, registry
from lit_gpt.model.gpt import GPT
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer, has_tokenizer


@dataclass
class Source:
    """What is to be exported: a checkpoint, with what a finetuned file adds to it."""

    base: BaseCheckpoint
    adapter: Path | None
    record: dict[str, Any]  # what the finetuned file holds; empty without one
    model: GPT
    reader: readers.LitReader
    reference: parity.Reference

    @classmethod
    def open(
        cls, checkpoint_dir: Path, adapter: Path | None = None, quantized: bool = False, merges: bool = False
    ) -> "Source":
        """Open a checkpoint as it is stored, or with `quantized` as the finetuned file's base was.

        Args:
            merges: whether the finetuned file must be of a method that merges.

        Raises:
            UserError: it is quantized though it should not be, or the finetuned file does not fit it.
        """
        if not quantized:
            checkpoint.refuse_quantized(checkpoint_dir)
        base, record, style = BaseCheckpoint.open(checkpoint_dir), {}, None
        if adapter:
            record = finetuned_file.read_file(adapter, None, base.fingerprint)
            if merges:
                check_merges(record, adapter)
            style = PromptStyle.from_dict(record["prompt_style"])
            base = base.quantized_as(record.get("quantize"), adapter) if quantized else base
        model = base.build()
        if adapter:
            finetuned_model.attach_record(model, adapter, record)
            model.eval()
        reader = readers.LitReader.open(checkpoint_dir, model, style)
        if reader.tokenizer is None:
            print(f"{checkpoint_dir}: holds no tokenizer, so only logits are compared")
        return cls(base, adapter, record, model, reader, parity.Reference.compute(reader))

    def write_prompt(self, folder: Path, stops: bool = True) -> None:
        """Write the chat template and the end tokens of the source's prompt style."""
        if self.reader.style and self.reader.tokenizer:
            self.reader.style.write_template(folder, self.reader.tokenizer)
            if stops:
                self.reader.style.write_stops(folder)

    def finish(self, folder: Path, out_dir: Path, use: str, library: str, figures: dict[str, Any]) -> None:
        """Write the card and the figures into an export that has passed."""
        checkpoint_dir = self.base.checkpoint_dir
        template = self.reader.style.template if self.reader.style else None
        figures = figures | model_card.provenance(checkpoint_dir, self.base.fingerprint, template, self.adapter)
        run_dir = self.adapter.parent if self.adapter else checkpoint_dir  # where the finetune left its records
        model_card.write(folder, out_dir.resolve().name, checkpoint_dir, run_dir, use, library, figures)


def to_hf(checkpoint_dir: Path, out_dir: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Export a converted checkpoint as a folder that transformers loads. Return the figures of its comparison.

    Args:
        dtype: in which to store the weights; None: as they are.
    """
    with files.new_folder(out_dir) as folder:
        source = Source.open(checkpoint_dir)
        hf.export(checkpoint_dir, folder, hf.Cast(source.base.state, dtype) if dtype else source.base.state)
        source.write_prompt(folder)
        what, packages = f"the export of {checkpoint_dir}", ("transformers",)
        reader = readers.read_back(what, packages, lambda: readers.read_hf(folder), lambda: readers.own_hf(folder))
        rounded = dtype not in (torch.float32, source.model.dtype)
        figures = source.reference.compare(
            reader, what, *(logits.rounding(dtype) if dtype and rounded else parity.SAME_SUMS)
        )
        use = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{out_dir.name}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{out_dir.name}")'
        )
        source.finish(folder, out_dir, use, "transformers", {"format": "hf", **figures})
    return figures


def to_gguf(checkpoint_dir: Path, out_dir: Path, dtype: str | None) -> dict[str, Any]:
    """Export a converted checkpoint as a file that llama.cpp loads. Return the figures of its comparison.

    Args:
        dtype: a key of gguf.writer.KINDS, in which matrices are stored; None: the checkpoint's dtype.
    """
    from lit_gpt.conversion.gguf import writer

    with files.new_folder(out_dir) as folder:
        source = Source.open(checkpoint_dir)
        config, state = source.base.config, source.base.state
        dtype = dtype or next(name for name in writer.DTYPES if writer.DTYPES[name] == state["wte.weight"].dtype)
        kind, read_as, stored = writer.KINDS[dtype], writer.READ_AS[dtype], {t.dtype for t in state.values()}
        path = folder / f"{config.name}-{kind.name}.gguf"
        layout = writer.write(path, checkpoint_dir, state, dtype, source.reader.style)
        if config.sliding_window and not layout.keeps_window:
            print(f"llama.cpp keeps no window for it: the context is cut to {config.sliding_window} tokens")
            source.reference = parity.Reference.compute(source.reader, min(config.sliding_window, parity.LENGTH))
        what = f"the export of {checkpoint_dir}"
        wide = torch.float32 if torch.float32 in stored else read_as
        if layout.unread:
            print(f"{what}: transformers' reader of GGUF {layout.unread}; read back by Lit-GPT itself")
            reader: readers.Reader = readers.own_gguf(path, config, wide)
        else:
            reader = readers.read_back(
                what,
                ("transformers",),
                lambda: readers.read_gguf(path, checkpoint_dir, wide),
                lambda: readers.own_gguf(path, config, wide),
            )
        limit = parity.SAME_SUMS
        if dtype == "q8_0":
            limit = writer.Q8_0_TOLERANCE, "that rounding to q8_0 explains"
        elif dtype != "fp32" and (stored != {read_as} or layout.folded):
            limit = logits.rounding(read_as)
        figures = source.reference.compare(reader, what, *limit)
        use = f'from llama_cpp import Llama\n\nmodel = Llama("{out_dir.name}/{path.name}")'
        source.finish(folder, out_dir, use, "gguf", {"format": "gguf", "dtype": kind.name.lower(), **figures})
    return figures


def check_merges(record: dict[str, Any], path: Path) -> None:
    """Refuse a finetuned file of a method that has no such form."""
    if not finetuned_model.method_of(record, path).merges:
        known = " or ".join(name for name, entry in registry.METHODS.items() if entry.attaches and entry.load().merges)
        raise UserError(f"{path}: trained by the method {record['method']}, expected {known}; use it beside its base")


def merge(checkpoint_dir: Path, path: Path, out_dir: Path, dtype: torch.dtype | None = None) -> float:
    """Fold a finetuned file into its base: a checkpoint folder. Return how far its logits are off, by their norm.

    Args:
        dtype: in which to store the weights; None: as the base is. In 16 bits, rounding swallows updates that are small
            beside the weights. What shifts the zero points of int4 (qa) leaves them quantized, where it is None.
    """
    with files.new_folder(out_dir) as folder:
        source = Source.open(checkpoint_dir, path, quantized=True, merges=True)
        shifts = dtype is None and lora.stays_quantized(source.model)
        if shifts:
            lora.write_shifted(folder, source.base, source.model)
        else:
            lora.write_merged(folder / "lit_model.pth", source.model, dtype)
        (folder / "lit_config.json").write_text(lora.merged_config(source.model).to_json())
        hf.copy_side_files(checkpoint_dir, folder)
        PromptStyle.from_dict(source.record["prompt_style"]).save(folder)
        model_card.copy_run(path.parent, folder)
        what, own = f"the merge of {path}", lambda: readers.LitReader.open(folder, load_model(folder))
        whole: Callable[[], readers.Reader] = own if shifts else lambda: readers.read_lit(folder)
        reader = readers.read_back(what, () if shifts else ("transformers",), whole, own)
        without = logits.float32_logits(source.base.build(), source.reference.idx)
        kept_as = dtype or source.model.dtype
        mend = "" if kept_as == torch.float32 else "; rounding swallowed the rest, --dtype fp32 keeps it"
        figures = source.reference.compare(reader, what, *logits.rounding(kept_as), base=without, mend=mend)
        use = f'from lit_gpt import load_model\n\nmodel = load_model("{out_dir.name}")'
        source.finish(folder, out_dir, use, "lit-gpt", {"format": "merged", **figures})
    return figures["logits_difference"]


def to_peft(checkpoint_dir: Path, path: Path, out_dir: Path) -> dict[str, Any]:
    """Export a finetuned file as an adapter that `PeftModel.from_pretrained` loads. Return the figures.

    It goes onto the base as that is stored. Where it was trained on a quantized one, that moves its logits, by how much
    is among the figures.
    """
    with files.new_folder(out_dir) as folder:
        if (checkpoint_dir / towers.FILE).is_file():
            raise UserError(
                f"{checkpoint_dir}: has other towers than the language model, and such a model's adapter cannot be a "
                "PEFT adapter yet; merge it by scripts/merge_lora.py and export the merged checkpoint"
            )
        source = Source.open(checkpoint_dir, path)
        method = source.record["method"]
        base = model_card.repository(checkpoint_dir) or str(checkpoint_dir)
        if method == lora.NAME:
            peft_lora.write(folder, source.model, lora.LoRAConfig(**source.record["hyperparameters"]), base)
        else:
            peft_others.write(folder, source.model, method, base, path)
        hf.copy_side_files(checkpoint_dir, folder, hf.TOKENIZER_FILES)
        source.write_prompt(folder, stops=False)  # an adapter goes by its base's generation_config.json
        what = f"the export of {path}"
        figures = source.reference.compare(read_adapter(what, source, folder), what) | moved_by_full_weights(source)
        use = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
            f'model = PeftModel.from_pretrained(base, "{out_dir.name}")'
        )
        source.finish(folder, out_dir, use, "peft", {"format": "peft", **figures})
    return figures


def moved_by_full_weights(source: Source) -> dict[str, Any]:
    """Return how far the logits of an adapter that was trained on a quantized base are off on full weights."""
    trained_on = source.record.get("quantize")
    if not trained_on:
        return {}
    trained = Source.open(source.base.checkpoint_dir, source.adapter, quantized=True).reference.logits
    moved = logits.difference(source.reference.logits, trained)
    print(
        f"{source.adapter}: trained on a base in {trained_on}; on the base as it is stored, which PEFT gives it, its "
        f"logits differ by {moved:.1e} of their norm. scripts/merge_lora.py keeps the base that it was trained on"
    )
    return {"trained_on": trained_on, "logits_difference_from_training": moved}


def read_adapter(what: str, source: Source, folder: Path) -> readers.Reader:
    """Read a PEFT adapter on the source's base, by PEFT where it is installed."""
    return readers.read_back(
        what,
        ("transformers", "peft"),
        lambda: readers.read_peft(source.base, folder),
        lambda: own_adapter(source, folder),
    )


def own_adapter(source: Source, folder: Path) -> readers.LitReader:
    """Read a PEFT adapter on a source's base by our own code. Raises UserError if it is not of LoRA."""
    base = source.base
    if source.record["method"] != lora.NAME:
        raise UserError(f"{source.adapter}: its export is compared with what PEFT makes of it; `pip install peft`")
    settings, state, _ = peft_lora.read(folder, base.config, base.state)
    model = base.build()
    finetuned_file.load_trained(lora.attach(model, settings), state, folder)
    return readers.LitReader.open(folder, model.eval())


def from_peft(peft_dir: Path, checkpoint_dir: Path, out_dir: Path) -> lora.LoRAConfig:
    """Take in a PEFT adapter: `out_dir` gets the file that finetune/lora.py would have left. Return its settings.

    The prompt style is that of the adapter's own chat template if it has one, else the checkpoint's.

    Raises:
        UserError: it has what is not supported, is for another base, or its logits under PEFT are others.
    """
    checkpoint.refuse_quantized(checkpoint_dir)
    base = BaseCheckpoint.open(checkpoint_dir)
    settings, state, remarks = peft_lora.read(peft_dir, base.config, base.state)
    with files.new_folder(out_dir) as folder:
        for remark in remarks:
            print(remark)
        own = has_tokenizer(peft_dir)
        templates = own and Tokenizer(peft_dir).chat_template is not None
        speaks = peft_dir if templates else checkpoint_dir
        style = PromptStyle.from_checkpoint(speaks, Tokenizer(speaks))
        path = folder / f"lit_model_{lora.NAME}_finetuned.pth"
        record = {"hyperparameters": asdict(settings), "prompt_style": style.to_dict()}
        finetuned_file.save_file(path, lora.NAME, base.fingerprint, state, **record)
        source = Source.open(checkpoint_dir, path)
        reference = source.reference
        if not own:
            reference = replace(reference, ids=[None] * len(reference.ids))
        if not templates:
            reference = replace(reference, prompts=[None] * len(reference.prompts))
        what = f"the adapter in {peft_dir}"
        reference.compare(read_adapter(what, source, peft_dir), what)
    return settings
