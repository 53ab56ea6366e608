"""Read LitGPT's own files: a checkpoint folder (`lit_model.pth` beside `model_config.yaml`), and what its finetuning
with LoRA leaves (`lit_model.pth.lora` beside `hyperparameters.yaml`).

The modules are those here under other names, and queries, keys and values lie in one tensor as they do here; releases
before 0.5.4 had them group by group. Gate and up are apart there and one here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.conversion import hf
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.files import atomic, new_folder, read_json, read_text
from lit_gpt.hardware import on_meta
from lit_gpt.methods import finetuned_file, lora
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.text.prompt_style import PromptStyle

WEIGHTS, LORA, SETTINGS, HYPERPARAMETERS = (
    "lit_model.pth", "lit_model.pth.lora", "model_config.yaml", "hyperparameters.yaml",
)  # fmt: skip
NAMES = {  # ours, and theirs
    r"^(wte|h|ln_f)\.": r"transformer.\1.",
    r"\.attn\.qk_norm\.([qk])\.": r".attn.norm_\1.",
    r"\.post_norm_1\.": ".post_attention_norm.",
    r"\.post_norm_2\.": ".post_mlp_norm.",
}
# Fields of model_config.yaml that say what config.json says, under the names of both sides.
SAME = (
    "n_layer", "n_head", "n_embd", "head_size", "n_query_groups", "intermediate_size", "norm_eps", "rotary_percentage",
    "rope_base", "parallel_residual", "shared_attention_norm",
)  # fmt: skip
STYLES = {"Alpaca": "alpaca", "Default": "plain"}  # those that render the same, by the names of their classes


def names(ours: str) -> tuple[str, ...]:
    """Return the tensors of LitGPT's that one of ours is made of, one below the other."""
    for pattern, theirs in NAMES.items():
        ours = re.sub(pattern, theirs, ours)
    return tuple(ours.replace("gate_up", part) for part in ("fc_1", "fc_2")) if "gate_up" in ours else (ours,)


def convert(litgpt_dir: Path, out_dir: Path) -> Config:
    """Write a checkpoint folder with the weights of LitGPT's.

    Raises:
        UserError: it lacks a file, config.json and model_config.yaml contradict each other, or the tensors do both.
    """
    config, stored = read_config(litgpt_dir), ungrouped(litgpt_dir, read_tensors(litgpt_dir / WEIGHTS))
    if (embedding := stored.get(names("wte.weight")[0])) is None:
        raise UserError(f"{litgpt_dir / WEIGHTS}: lacks {names('wte.weight')[0]}; is it LitGPT's?")
    config = replace(config, padded_vocab_size=embedding.size(0))
    if config.tie_embeddings:
        head = stored.get("lm_head.weight")
        if head is None or torch.equal(head, embedding):
            stored.pop("lm_head.weight", None)
        else:
            config = replace(config, tie_embeddings=False)
    with on_meta():
        expected = GPT(config).state_dict()
    for name in [name for name in expected if name.startswith("lm_head.")] if config.tie_embeddings else ():
        del expected[name]
    check(litgpt_dir / WEIGHTS, expected, stored)
    layout = {name: t.to(stored[names(name)[0]].dtype) for name, t in expected.items()}
    with new_folder(out_dir) as folder:
        hf.copy_side_files(litgpt_dir, folder)
        io.write_streamed(folder / WEIGHTS, layout, joined(expected, stored))
        with atomic(folder / "lit_config.json") as temporary:
            temporary.write_text(config.to_json())
    return config


def read_config(litgpt_dir: Path) -> Config:
    """Return the Config by config.json, which model_config.yaml must not contradict."""
    path = litgpt_dir / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; put the config.json of the model on the hub there, which LitGPT left out"
        )
    config, settings = config_from_hf(read_json(path), name=litgpt_dir.name), read_yaml(litgpt_dir / SETTINGS)
    if config.n_expert or config.other_mixers:
        raise UserError(f"{path}: a model with experts or recurrent layers; convert the model's own files instead")
    for name in SAME:
        theirs, ours = settings.get(name), getattr(config, name)
        if theirs is not None and abs(theirs - ours) > 1e-9 * abs(ours):
            raise UserError(f"{litgpt_dir / SETTINGS}: {name} is {theirs}, but by config.json it is {ours}")
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a folder that LitGPT wrote")
    try:
        fields = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected fields with values")
    return fields


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a file of tensors, which LitGPT may keep under the name `model`."""
    state = io.load(path)
    state = state.get("model", state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds more than tensors; expected what LitGPT writes")
    return {name.replace(".linear.", "."): tensor for name, tensor in state.items()}


def ungrouped(litgpt_dir: Path, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with queries, keys and values one after another, as releases from 0.5.4 on have them."""
    if not any(".attn.attn." in name for name in stored):
        return stored
    settings = read_yaml(litgpt_dir / SETTINGS)
    groups, heads = settings["n_query_groups"], settings["n_head"]
    size = settings.get("head_size") or settings["n_embd"] // heads

    def apart(tensor: Tensor) -> Tensor:
        parts = [group.split((heads // groups * size, size, size)) for group in tensor.chunk(groups)]
        return torch.cat([part for kind in zip(*parts, strict=True) for part in kind])

    old = ".attn.attn."
    return {n.replace(old, ".attn.qkv."): apart(t) if old in n else t for n, t in stored.items()}


def check(path: Path, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, left over or of other shapes than expected. Raises UserError."""
    wanted = {theirs for ours in expected for theirs in names(ours)}
    for what, found in (("lacks", wanted - stored.keys()), ("has besides", stored.keys() - wanted)):
        if found:
            raise UserError(
                f"{path}: {what} {', '.join(sorted(found)[:4])}" + (" and others" if len(found) > 4 else "")
            )
    for name, tensor in expected.items():
        shapes = [stored[theirs].shape for theirs in names(name)]
        if torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]]) != tensor.shape:
            raise UserError(
                f"{path}: {names(name)[0]} is {tuple(shapes[0])}, which does not make {tuple(tensor.shape)}"
            )


def joined(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in expected:
        yield name, torch.cat([stored[theirs] for theirs in names(name)])


def convert_lora(litgpt_dir: Path, checkpoint_dir: Path, out_dir: Path) -> lora.LoRAConfig:
    """Write the file that finetune/lora.py would have left, from what LitGPT's has, and return its settings.

    Args:
        checkpoint_dir: the base, converted.

    Raises:
        UserError: a file is missing, or the tensors are not those of its own settings on this base.
    """
    path, base = litgpt_dir / LORA, BaseCheckpoint.open(checkpoint_dir)
    settings = lora_settings(litgpt_dir / HYPERPARAMETERS)
    stored = {name: tensor.float() for name, tensor in read_tensors(path).items()}
    with on_meta():
        model = lora.attach(GPT(base.config), settings)
    expected = finetuned_file.trained_state(model)
    check(path, expected, stored)
    with new_folder(out_dir) as folder:
        record = {"hyperparameters": asdict(settings), "prompt_style": prompt_style(litgpt_dir, base).to_dict()}
        state = dict(joined(expected, stored))
        target = folder / f"lit_model_{lora.NAME}_finetuned.pth"
        finetuned_file.save_file(target, lora.NAME, base.fingerprint, state, **record)
    return settings


def lora_settings(path: Path) -> lora.LoRAConfig:
    """Return the settings of a hyperparameters.yaml."""
    fields = {name.removeprefix("lora_"): v for name, v in read_yaml(path).items() if name.startswith("lora_")}
    try:
        return lora.LoRAConfig(**fields)
    except TypeError as error:
        raise UserError(f"{path}: not the settings of a LoRA finetune ({error})") from None


def prompt_style(litgpt_dir: Path, base: BaseCheckpoint) -> PromptStyle:
    """Return the style here of a prompt_style.yaml, or the checkpoint's where there is none or no such; it is said."""
    path = litgpt_dir / "prompt_style.yaml"
    theirs = str(read_yaml(path).get("class_path", "")).rpartition(".")[2] if path.is_file() else "none"
    if theirs in STYLES:
        return PromptStyle.from_name(STYLES[theirs], base.tokenizer)
    print(f"{path}: the style {theirs} has no name here; answers are rendered as {base.prompt_style.name}")
    return base.prompt_style
