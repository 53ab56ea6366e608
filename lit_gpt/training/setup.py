"""Sets up a finetuning run: checks, data, model, strategy; and writes its result."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_gpt import hardware
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.conversion import hf
from lit_gpt.data import dataset as data
from lit_gpt.distributed import heartbeat, launch, sharding
from lit_gpt.errors import UsageError
from lit_gpt.methods.finetuned_file import file_contents, trained_state
from lit_gpt.methods.method import Method
from lit_gpt.model.gpt import GPT
from lit_gpt.quantization.modules import count_parameters
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.training import compile, strategy
from lit_gpt.training.checks import (
    check_batch,
    check_lengths,
    check_offload,
    check_quantized,
    check_vocabulary,
    length_limit,
)
from lit_gpt.training.evaluate import print_sample
from lit_gpt.training.loop import Trainer
from lit_gpt.training.memory_plan import choose_settings, row_tokens
from lit_gpt.training.probe import Probe
from lit_gpt.training.records import Records
from lit_gpt.training.resume import States
from lit_gpt.training.schedule import Schedule


def finetune(hp: SimpleNamespace, method: Method) -> None:
    """Train what `method` leaves trainable in the model of `hp.checkpoint_dir`, and write `hp.out_dir`.

    Args:
        hp: the flags of finetune/lora.py. Weights that do not train are kept in `hp.precision`, those that do in
            float32, while `hp.precision` is that of the arithmetic.

    Raises:
        UsageError: flags that contradict each other.
        UserError: checkpoint, data or out_dir cannot be used, or another process of the run is lost.
    """
    if hp.out_dir.resolve() == hp.checkpoint_dir.resolve():
        raise UsageError(f"--out_dir {hp.out_dir}: is the base's own folder; choose another")
    trained = method.weight_dtype(hp) if method.whole_model else torch.float32
    fabric = launch.launch(hp, trained, frozen=hardware.DTYPES[hp.precision])
    with heartbeat.peer_watchdog(fabric), compile.kernels_if(hp.compile):
        train_method(hp, method, fabric)


def train_method(hp: SimpleNamespace, method: Method, fabric: Fabric) -> None:
    check_batch(hp, fabric.world_size)
    base = BaseCheckpoint.of(hp.checkpoint_dir, hp.quantize)
    check_quantized(hp, method, base.quantize)
    method, config = replace(method, quantize=base.quantize), base.config
    tokenizer = Tokenizer(hp.checkpoint_dir)
    meta = data.read_meta(hp.data_dir, tokenizer)
    train, validation = (data.Dataset(hp.data_dir, split) for split in data.SPLITS)
    check_lengths(hp, train, validation)
    style = PromptStyle.from_dict(meta["prompt_style"])
    probe = hp.probe_path and Probe(hp.probe_path, tokenizer, style, length_limit(hp))
    schedule = Schedule.of(hp, len(train))
    records = Records(hp, fabric)
    records.check_unused()
    on_cuda, room = fabric.device.type == "cuda", hardware.device_memory(fabric.device)
    check_offload(hp, on_cuda)
    compiled = compile.wanted(hp, config, base.quantize, fabric.device.type)

    if not hp.micro_batch_size and not hp.micro_batch_tokens:
        hp.micro_batch_tokens = row_tokens(config, method, hp, room if on_cuda else None)
    check_vocabulary(config, train, validation, *([probe] if probe else ()))
    model = load_to_train(hp, method, fabric, base)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fabric.print(f"{method.name}: training {trainable:,} of {count_parameters(model):,} parameters")
    wrapped, optimizer = strategy.setup(fabric, model, hp)

    identity = {"base": base.fingerprint, "data": train.fingerprint, "settings": method.settings}
    identity["quantization"] = base.quantization
    identity["probe"] = probe and probe.fingerprint
    if probe:
        fabric.print(f"probe {hp.probe_path}: {probe.describe()}")
    run = Trainer(hp, fabric, wrapped, model, optimizer, train, validation, schedule, records, probe)
    run.states = States(hp, fabric, identity)
    record = {"hyperparameters": method.settings, "prompt_style": style.to_dict(), "quantize": base.quantization}
    run.contents = partial(file_contents, method.name, base.fingerprint, **record)
    run.arithmetic = partial(method.autocast, hp, fabric.device.type)
    run.plan = partial(choose_settings, config, method, hp, cuda=on_cuda, memory=room)
    run.compiled = compiled
    run.sample = partial(print_sample, fabric, model, tokenizer, style, validation[0], hp)
    if not run.fit():
        return
    trained = trained_state(model)

    def write() -> None:
        if method.whole_model:
            result = write_checkpoint(hp, trained, base, style)
        else:
            result = hp.out_dir / f"lit_model_{method.name}_finetuned.pth"
            io.save(result, run.contents(trained))
        records.finish(method.name, trainable, base.quantization)
        print(f"wrote {result}{run.where_better()}")

    launch.on_main(fabric, write)


def load_to_train(hp: SimpleNamespace, method: Method, fabric: Fabric, base: BaseCheckpoint) -> GPT:
    torch.manual_seed(hp.seed % 2**63)
    shared = sharding.place_to_build(hp, fabric)
    # FSDP casts each rank's share by itself: the whole stays mapped from its file
    kept = None if hp.strategy == "fsdp" else method.weight_dtype(hp)
    return method.attach(base.build(kept, shared))


def write_checkpoint(hp: SimpleNamespace, state: dict[str, Tensor], base: BaseCheckpoint, style: PromptStyle) -> Path:
    """Make out_dir a checkpoint folder like the base's, in its dtypes."""
    hf.copy_side_files(hp.checkpoint_dir, hp.out_dir)
    style.save(hp.out_dir)
    tensors = ((name, state[name]) for name in base.state)
    io.write_streamed(hp.out_dir / "lit_model.pth", base.state, tensors)
    (hp.out_dir / "lit_config.json").write_text(base.config.to_json())
    return hp.out_dir
