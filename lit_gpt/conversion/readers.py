"""Independent readers of an export: transformers, PEFT, gguf, and this project itself."""

import importlib.util
import io
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_gpt import files
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints.base_model import BaseCheckpoint, build_model
from lit_gpt.conversion import hf_shards, towers, weights
from lit_gpt.conversion import logits as verify
from lit_gpt.conversion.gguf import importer, metadata
from lit_gpt.conversion.gguf.layout import layout_of
from lit_gpt.conversion.gguf.reader import GGUFFile
from lit_gpt.conversion.gguf.tokenizer import Vocabulary
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.model.rope import rope_frequencies
from lit_gpt.text.messages import Message
from lit_gpt.text.prompt_style import FILE, PromptStyle, as_list
from lit_gpt.text.tokenizer import Tokenizer, has_tokenizer


class Reader(Protocol):
    """A model with its tokenizer and template, read from files."""

    name: str

    def logits(self, idx: Tensor) -> Tensor:
        """Return the logits for `idx` (B, T), computed in float32."""

    def ids(self, text: str) -> list[int] | None:
        """Return the tokens of a text; None where there is no tokenizer."""

    def prompt(self, messages: list[Message]) -> list[int] | None:
        """Return the tokens of a conversation in the chat template; None where there is none."""

    def stops(self) -> set[int] | None:
        """Return the ids that end an answer; None where nothing names them."""


@dataclass
class LitReader:
    """A model as this project reads it; every export is compared with one."""

    model: nn.Module  # a GPT, or transformers' model of the same state dict
    tokenizer: Tokenizer | None
    style: PromptStyle | None
    name: str = "Lit-GPT"

    @classmethod
    def open(cls, folder: Path, model: nn.Module, style: PromptStyle | None = None, name: str = name) -> "LitReader":
        """Open a checkpoint folder, with its own prompt style or another."""
        tokenizer = Tokenizer(folder) if has_tokenizer(folder) else None
        if style is None and tokenizer and (tokenizer.chat_template or (folder / FILE).is_file()):
            style = PromptStyle.from_checkpoint(folder, tokenizer)
        return cls(model, tokenizer, style, name)

    def logits(self, idx: Tensor) -> Tensor:
        before = torch.tensor(getattr(self.model, "virtual_tokens", ()), dtype=idx.dtype).expand(len(idx), -1)
        return verify.float32_logits(self.model, torch.cat((before, idx), dim=1))[:, before.size(1) :]

    def ids(self, text: str) -> list[int] | None:
        return self.tokenizer.encode(text).tolist() if self.tokenizer else None

    def prompt(self, messages: list[Message]) -> list[int] | None:
        try:
            return self.style.encode_prompt(messages, self.tokenizer) if self.style and self.tokenizer else None
        except UserError:  # a template may refuse a conversation, such as one without a system message
            return None

    def stops(self) -> set[int] | None:
        return set(self.style.stop_ids) if self.style else None


@dataclass
class HFReader:
    """A model as transformers, with PEFT or without, reads it."""

    model: nn.Module
    tokenizer: Any  # PreTrainedTokenizerBase, or None
    stop_ids: set[int] | None = None  # an adapter names none
    name: str = "transformers"

    def logits(self, idx: Tensor) -> Tensor:
        with reading(f"the export, by {self.name},"):
            return verify.float32_logits(self.model, idx)[:, -idx.size(1) :]  # without those of virtual tokens

    def ids(self, text: str) -> list[int] | None:
        if self.tokenizer is None:
            return None
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids  # a prompt has no end

    def prompt(self, messages: list[Message]) -> list[int] | None:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            return None
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def stops(self) -> set[int] | None:
        return self.stop_ids


def missing(*packages: str) -> list[str]:
    """Return which of these packages are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Run another's reader quietly, and say what it raises in one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # progress bars
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # a reader can fail in any way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} cannot be read back ({reason}); nothing was written") from None
    finally:
        logging.set_verbosity(level)


def read_hf(folder: Path) -> Reader:
    """Read a folder by transformers. Its weights stay mapped from the files."""
    with reading(f"the export in {folder}"):
        from transformers import AutoModelForCausalLM, PreTrainedModel

        model: PreTrainedModel
        info: dict[str, Any]
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        model, info = loaded  # type: ignore[misc]  # the stub forgets output_loading_info
        if lost := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise UserError(f"transformers does not find its tensors in the export: {lost[0]}; nothing was written")
        return HFReader(model, hf_tokenizer(folder), set(as_list(model.generation_config.eos_token_id)))


def own_hf(folder: Path) -> LitReader:
    """Read a folder of transformers by our own code."""
    config = config_from_hf(files.read_json(folder / "config.json"), name=folder.name)
    stored = towers.language_model(hf_shards.StoredWeights(folder))
    config = weights.as_stored(config, stored)
    return LitReader.open(
        folder, build_model(config, dict(weights.to_lit(weights.rows(config), stored)), source=folder)
    )


def read_lit(folder: Path) -> Reader:
    """Read a checkpoint folder of ours, to compute with its weights by transformers."""
    with reading(f"the checkpoint in {folder}"):
        model = hf_model(folder, checkpoint.load_state(folder), Config.from_checkpoint(folder))
        return LitReader.open(folder, model, name="transformers")


def read_peft(base: BaseCheckpoint, folder: Path) -> Reader:
    """Read an adapter by PEFT, onto transformers' model of the base's weights."""
    with reading(f"the adapter in {folder}"):
        from peft import PeftModel

        model = hf_model(base.checkpoint_dir, base.state, base.config)
        return HFReader(PeftModel.from_pretrained(model, folder), hf_tokenizer(folder), name="PEFT")


def read_gguf(path: Path, checkpoint_dir: Path, dtype: torch.dtype) -> Reader:
    """Read a GGUF file by transformers, dequantized to `dtype`.

    Its tokens are read by our own code, for transformers passes over how the file says that text is split. It passes
    over rotary scaling, too, which is therefore given to it.
    """
    with reading(f"the file {path.name}"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = Config.from_checkpoint(checkpoint_dir)
        given = {"config": AutoConfig.from_pretrained(checkpoint_dir)} if config.rope_scaling else {}
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **given)
        return own_gguf(path, config, dtype, model)


def own_gguf(path: Path, config: Config, dtype: torch.dtype, model: nn.Module | None = None) -> LitReader:
    """Read a GGUF file by our own code; with `model`, all of it but the weights.

    Raises:
        UserError: its metadata is not what the model's configuration says.
    """
    file = GGUFFile(path)
    tokens = Vocabulary(file)
    config = replace(config, **layout_of(config).folded)
    check_same(config_from_hf(metadata.hf_config(file, tokens, dtype)), config, path)
    if model is None:
        table = importer.table_of(file, config)
        state = dict(weights.to_lit(table, importer.GGUFWeights(file, dtype), str(path)))
        model = build_model(config, state, source=path)
    with tempfile.TemporaryDirectory() as folder:
        importer.write_tokenizer(Path(folder), file, tokens)
        own = LitReader.open(Path(folder), model, name="Lit-GPT" if isinstance(model, GPT) else "transformers")
        own.ids("")  # what is lazy is read while the folder is there
    return own


def check_same(actual: Config, expected: Config, path: Path) -> None:
    """Refuse a file whose metadata is that of another architecture. Rotary scaling is compared by what it does."""
    apart = {"name", "family", "block_size", "sliding_window", "vocab_size", "rope_scaling"}
    if actual.sliding_window is None:
        apart.add("global_layers")  # the context ends where the window would
    if not expected.dense_layers:
        apart.add("dense_intermediate_size")
    for name, value in asdict(actual).items():
        wanted = getattr(expected, name)
        same = math.isclose(value, wanted, rel_tol=1e-6) if isinstance(value, float) else value == wanted
        if name not in apart and not same:
            raise UserError(f"{path.name}: says {name} {value} for {wanted}; nothing was written")
    (theirs, factor), (ours, our_factor) = rope_frequencies(actual), rope_frequencies(expected)
    if not torch.allclose(theirs, ours, rtol=1e-5, atol=0) or not math.isclose(factor, our_factor, rel_tol=1e-6):
        raise UserError(f"{path.name}: says another rotary scaling than {expected.rope_scaling}; nothing was written")


def hf_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer by transformers; return None where there is none."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder) if has_tokenizer(folder) else None


def hf_model(checkpoint_dir: Path, state: Mapping[str, Tensor], config: Config) -> nn.Module:
    """Return transformers' model of a lit state dict, in the same memory where the tensors are stored alike."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

    theirs = AutoConfig.from_pretrained(checkpoint_dir).get_text_config()
    theirs.tie_word_embeddings = config.tie_embeddings
    if hasattr(theirs, "quantization_config"):
        del theirs.quantization_config  # of the downloaded files
    tensors, dtype = dict(weights.to_hf(weights.rows(config), state)), state["wte.weight"].dtype
    cls: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs)]  # type: ignore[assignment]  # one, no tuple
    return cls.from_pretrained(None, config=theirs, state_dict=tensors, dtype=dtype)


def read_back(what: str, packages: tuple[str, ...], theirs: Callable[[], Reader], own: Callable[[], Reader]) -> Reader:
    """Read an export back by an independent reader, or by our own where its packages are not installed."""
    if lacking := missing(*packages):
        print(f"{what}: {' and '.join(lacking)} not installed; read back by Lit-GPT itself")
        return own()
    return theirs()
