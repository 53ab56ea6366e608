"""Refuses runs that cannot work, before anything is loaded."""

from types import SimpleNamespace

from lit_gpt.data import dataset as data
from lit_gpt.errors import UsageError, UserError
from lit_gpt.methods.method import Method
from lit_gpt.model.config import Config
from lit_gpt.training.probe import Probe


def check_batch(hp: SimpleNamespace, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly."""
    if hp.batch_size % world_size:
        raise UsageError(f"--batch_size {hp.batch_size}: expected a multiple of the {world_size} devices")
    share, micro = hp.batch_size // world_size, hp.micro_batch_size
    if micro and share % micro:
        raise UsageError(f"--micro_batch_size {micro}: expected a divisor of the {share} samples of a step per device")
    if getattr(hp, "optimizer_in_backward", False) and (world_size > 1 or micro != share):
        raise UsageError(
            "--optimizer_in_backward true: needs one device, and one packed row per step: "
            f"--micro_batch_size {hp.batch_size}"
        )


def check_quantized(hp: SimpleNamespace, method: Method, quantize: str | None) -> None:
    """Refuse what a quantized base does not go with."""
    asked = f"--quantize {quantize}" if hp.quantize else f"--checkpoint_dir {hp.checkpoint_dir} ({quantize})"
    if quantize and method.whole_model:
        raise UsageError(f"{asked}: quantized weights cannot train; finetune/lora.py trains beside them")
    if quantize and hp.strategy in ("fsdp", "deepspeed"):
        raise UsageError(f"{asked}: --strategy {hp.strategy} does not share out quantized weights; use ddp")


def check_offload(hp: SimpleNamespace, on_cuda: bool) -> None:
    if hp.activation_checkpointing == "offload" and not on_cuda:
        raise UsageError("--activation_checkpointing offload: there is no GPU to move activations away from; try full")


def check_lengths(hp: SimpleNamespace, *splits: data.Dataset) -> None:
    longest, limit = max(max(split.lengths) for split in splits), length_limit(hp)
    if longest > limit:
        raise UserError(
            f"--data_dir {hp.data_dir}: holds samples of up to {longest} tokens, more than --max_seq_length {limit}; "
            f"prepare it again with --max_seq_length {limit}"
        )


def length_limit(hp: SimpleNamespace) -> int:
    """Tokens that a sample may have."""
    block_size = Config.from_checkpoint(hp.checkpoint_dir).block_size
    return min(hp.max_seq_length or block_size, block_size)


def check_vocabulary(config: Config, *splits: data.Dataset | Probe) -> None:
    largest = max(int(split.tokens.max()) for split in splits)
    if largest >= config.padded_vocab_size:
        raise UserError(
            f"the tokenizer gives the id {largest}, but the model's embedding has {config.padded_vocab_size} rows; "
            "are both of the same checkpoint?"
        )
