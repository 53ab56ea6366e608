"""Leads from the flags and words that other tools have to ours: spellings taken as they are, names told in the error.

`NAMES` and `ADVICE` are open: a line here is all that another habit needs.
"""

import difflib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from lit_gpt.errors import UsageError

# Words for values that are ours under another name, by flag: those of Lightning, of bitsandbytes and of llama.cpp.
DTYPES = {
    "bf16-true": "bf16", "bf16-mixed": "bf16", "bfloat16": "bf16", "16-true": "fp16", "16-mixed": "fp16",
    "float16": "fp16", "f16": "fp16", "32-true": "fp32", "32": "fp32", "float32": "fp32", "f32": "fp32",
}  # fmt: skip
VALUES = {
    "precision": DTYPES,
    "dtype": DTYPES,
    "quantize": {"bnb.nf4": "nf4", "bnb.nf4-dq": "nf4-dq", "bnb.int8": "int8", "4bit": "nf4", "8bit": "int8"},
}

DASHES = "–—−"  # which editors and pages put in place of hyphens

# Our flags, each with the names that others have for it: transformers, TRL, PEFT, LitGPT, llama.cpp, OpenAI.
NAMES = {
    "checkpoint_dir": "model_name_or_path model_name base_model model_path model_id",
    "repo_id": "model_name_or_path model_name model_id",
    "access_token": "token hf_token",
    "data_dir": "dataset dataset_name data train_file data_file data.json_path",
    "data_path": "dataset dataset_name data train_file data_file data.json_path",
    "validation_path": "validation_file eval_file",
    "validation_fraction": "test_size val_set_size val_split_fraction data.val_split_fraction",
    "mask_inputs": "data.mask_prompt",
    "prompt_style": "chat_template template data.prompt_style",
    "max_seq_length": "max_length max_seq_len cutoff_len model_max_length seq_len train.max_seq_length",
    "out_dir": "output_dir output",
    "out": "output output_file",
    "finetuned_path": "adapter adapter_path lora_path lora peft_model adapter_name_or_path",
    "learning_rate": "lr optimizer.lr",
    "min_lr": "train.min_lr",
    "weight_decay": "wd optimizer.weight_decay",
    "warmup_steps": "train.lr_warmup_steps",
    "attention_group": "group_size use_shifted_sparse_attention s2_attention shift_attn",
    "schedule": "lr_scheduler lr_scheduler_type",
    "optimizer": "optim",
    "max_grad_norm": "max_norm gradient_clip_val train.max_norm",
    "epochs": "num_train_epochs num_epochs train.epochs",
    "max_steps": "num_steps total_steps iters train.max_steps",
    "batch_size": "train.global_batch_size global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "lora_r": "lora_rank rank r",
    "activation_checkpointing": "gradient_checkpointing",
    "precision": "torch_dtype",
    "dtype": "torch_dtype",
    "compile": "torch_compile",
    "devices": "num_gpus gpus nproc_per_node",
    "device": "device_map use_cuda no_cuda",
    "num_nodes": "nnodes",
    "logger": "report_to logger_name",
    "log_interval": "logging_steps train.log_interval",
    "eval_interval": "eval_steps eval.interval",
    "eval_samples": "eval.max_iters",
    "sample_tokens": "eval.max_new_tokens",
    "save_interval": "save_steps train.save_interval",
    "keep_states": "save_total_limit",
    "patience": "early_stopping early_stopping_patience",
    "metric": "eval_metric metric_for_best_model",
    "max_new_tokens": "max_tokens n_predict max_length",
    "temperature": "temp",
    "num_samples": "num_return_sequences n",
    "prompt_file": "file",
    "context": "ctx_size",
    "system": "system_prompt",
}

# Flags of others that are no flag here, and what to do instead.
ADVICE = {
    "gradient_accumulation_steps": "--batch_size counts the samples of a whole optimizer step, --micro_batch_size "
    "those of one packed row; how often gradients are added up follows",
    "per_device_train_batch_size": "--batch_size counts the samples of an optimizer step over all devices, "
    "--micro_batch_size those of one packed row",
    "per_device_eval_batch_size": "validation packs rows as training does: --micro_batch_size or --micro_batch_tokens",
    "lora_target_modules": "--lora_query, --lora_key, --lora_value, --lora_projection, --lora_mlp and --lora_head "
    "choose the layers",
    "target_modules": "--lora_query, --lora_key, --lora_value, --lora_projection, --lora_mlp and --lora_head "
    "choose the layers",
    "warmup_ratio": "--warmup_steps counts steps; left out, it fits the length of the run",
    "wandb": "use --logger wandb",
    "tensorboard": "use --logger tensorboard",
    "bf16": "use --precision bf16, which is the default",
    "fp16": "use --precision fp16",
    "fp32": "use --precision fp32",
    "load_in_4bit": "use --quantize nf4",
    "load_in_8bit": "use --quantize int8",
    "qlora": "use --quantize nf4",
    "deepspeed": "use --strategy deepspeed",
    "fsdp": "use --strategy fsdp",
    "resume_from_checkpoint": "use --resume auto, with the same --out_dir",
    "adam_beta1": """use --optimizer_args '{"betas": [0.9, 0.95]}'""",
    "adam_beta2": """use --optimizer_args '{"betas": [0.9, 0.95]}'""",
    "adam_epsilon": """use --optimizer_args '{"eps": 1e-6}'""",
    "packing": "samples are always packed into rows, and none sees another",
    "train_on_inputs": "use --mask_inputs false when the data is prepared",
    "completion_only_loss": "the answers alone are learned, unless the data is prepared with --mask_inputs false",
    "trust_remote_code": "leave it out: code that comes with a model is never run",
    "do_sample": "--temperature 0 takes the likeliest token, anything above draws",
    "load_best_model_at_end": "use --result best",
}


# Flags of ours that some scripts lack, and where they are.
ELSEWHERE = {
    "finetuned_path": "generate/finetuned.py, the scripts of generate/ named after a method, chat/base.py and eval/ "
    "take --finetuned_path",
    "loras": "generate/serve.py and scripts/combine_loras.py take --loras",
    "merge": "generate/lora.py takes --merge; scripts/merge_lora.py writes a merged checkpoint",
    "prompt_style": "the data is prepared with a --prompt_style, and what is trained on it keeps that",
    **dict.fromkeys(("prompt", "prompt_file", "json_schema"), "the scripts of generate/ take it"),
    **dict.fromkeys(
        ("stop", "min_p", "top_p", "top_k", "temperature", "repetition_penalty"),
        "the scripts of generate/ and chat/ take it",
    ),
    **dict.fromkeys(
        ("validation_path", "validation_fraction", "mask_inputs", "deduplicate"),
        "the scripts that prepare data take it",
    ),
    **dict.fromkeys(("learning_rate", "epochs", "max_steps"), "the scripts of finetune/ take it"),
}


def underscored(argument: str) -> str:
    """Return `--some-flag` or `--some-flag=value` with underscores in the flag's name."""
    name, equals, value = argument.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}" if argument.startswith("--") else argument


def respell(previous: str, argument: str, choices: dict[str, str]) -> str:
    """Return an argument with our word for a value that others name otherwise, where the flag takes ours.

    Args:
        choices: {flag: what it takes, as help shows it}.
    """
    flag, _, value = argument.partition("=") if argument.startswith("--") else (previous, "", argument)
    name = flag.removeprefix("--")
    ours = VALUES.get(name, {}).get(value)
    # what the flag takes itself stays, such as q8_0 beside fp16
    return argument.removesuffix(value) + ours if ours and ours in choices.get(name, "") else argument


def with_true(argv: Iterable[str], kinds: dict[str, Any]) -> Iterator[str]:
    """Yield the arguments, with true for flags of yes or no that stand alone, and `--no_flag` as false."""
    for argument, following in pairwise([*argv, "--"]):
        name = argument.removeprefix("--")
        if argument.startswith("--no_") and name not in kinds and is_bool(kinds.get(negated := name[3:])):
            yield f"--{negated}=false"
        elif argument.startswith("--") and is_bool(kinds.get(name)) and following.startswith("--"):
            yield f"{argument}=true"
        else:
            yield argument


def refuse_empty_paths(argv: Iterable[str], kinds: dict[str, Any]) -> None:
    """Refuse a path that is empty, as a shell's unset variable is: it would stand for the folder that we are in.

    Raises:
        UsageError
    """
    for argument, following in pairwise([*argv, "--"]):
        name, equals, value = argument.removeprefix("--").partition("=")
        kind = kinds.get(name) if argument.startswith("--") else None
        if Path in (kind, *get_args(kind)) and not (value if equals else following):
            raise UsageError(f"--{name}: expected a path, got ''; . is the folder that you are in")


def is_bool(kind: Any) -> bool:
    return kind is bool or bool in get_args(kind)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return which of the names is meant by another one: by the tables, or the nearest in letters; None: none is."""
    known = list(names)
    begun = sorted((ours for ours in known if ours.startswith(name)), key=len)
    near = [*begun, *difflib.get_close_matches(name, known, n=1, cutoff=0.7)]
    return named_otherwise(name, known) or next(iter(near), None)


def named_otherwise(name: str, names: Iterable[str]) -> str | None:
    """Return which of our names others call so, if the tables know it."""
    return next((ours for ours, theirs in NAMES.items() if ours in names and name.lower() in theirs.split()), None)


def unknown_flag(flag: str, flags: dict[str, Any]) -> str:
    """Return the error line for a flag that a script does not have, with ours for it, or the nearest in letters."""
    name = flag.lstrip("-" + DASHES)
    ours = named_otherwise(name, flags)
    there = None if name in flags else ELSEWHERE.get(named_otherwise(name, ELSEWHERE) or name)
    if instead := f"here it is --{ours}" if ours else ADVICE.get(name.lower(), there):
        return f"unknown flag {flag}: {instead}"
    near = nearest(name, flags)
    return f"unknown flag {flag}" + (f"; did you mean --{near}?" if near else "; --help lists the flags")
