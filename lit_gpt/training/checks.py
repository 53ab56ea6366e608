"""Refuses runs that cannot work, before anything is loaded."""

from collections.abc import Iterable

from torch import Tensor

from lit_gpt.data.dataset import Samples
from lit_gpt.errors import UsageError, UserError
from lit_gpt.methods.method import Method
from lit_gpt.model.config import Config
from lit_gpt.training.args import TrainArgs


def check_batch(args: TrainArgs, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly."""
    size, micro = args.batch.batch_size, args.batch.micro_batch_size
    if size % world_size:
        raise UsageError(f"--batch_size {size}: expected a multiple of the {world_size} devices")
    share = size // world_size
    if micro and share % micro:
        raise UsageError(f"--micro_batch_size {micro}: expected a divisor of the {share} samples of a step per device")
    if not args.optimization.optimizer_in_backward:
        return
    if world_size > 1 or micro != share:
        raise UsageError(
            f"--optimizer_in_backward true: needs one device, and one packed row per step: --micro_batch_size {size}"
        )
    if args.optimization.max_grad_norm is not None:
        raise UsageError(
            f"--max_grad_norm {args.optimization.max_grad_norm}: needs all gradients at once, which "
            "--optimizer_in_backward true never holds; leave one out"
        )


def check_quantized(args: TrainArgs, method: Method, quantize: str | None) -> None:
    """Refuse what a base that is quantized to the format `quantize` does not go with."""
    by_flag = args.memory.quantize is not None
    asked = f"--quantize {quantize}" if by_flag else f"--checkpoint_dir {args.paths.checkpoint_dir} ({quantize})"
    if quantize and method.trains_base:
        raise UsageError(f"{asked}: quantized weights cannot train; finetune/lora.py trains beside them")
    if quantize and args.devices.strategy in ("fsdp", "deepspeed"):
        raise UsageError(f"{asked}: --strategy {args.devices.strategy} does not share out quantized weights; use ddp")


def check_sharding(args: TrainArgs, method: Method) -> None:
    """Refuse to share out among ranks what a method wants whole."""
    if method.unsharded and args.devices.strategy in ("fsdp", "deepspeed"):
        raise UsageError(f"{method.unsharded}: --strategy {args.devices.strategy} does not share that out; use ddp")


def check_offload(args: TrainArgs, on_cuda: bool) -> None:
    """Refuse to offload where there is nothing to offload from."""
    if args.memory.activation_checkpointing == "offload" and not on_cuda:
        raise UsageError("--activation_checkpointing offload: there is no GPU to move activations away from; try full")


def check_lengths(args: TrainArgs, limit: int, *splits: Samples) -> None:
    """Refuse data with samples of more than `limit` tokens."""
    longest = max(max(split.lengths) for split in splits)
    if longest > limit:
        raise UserError(
            f"--data_dir {args.paths.data_dir}: holds samples of up to {longest} tokens, more than --max_seq_length "
            f"{limit}; prepare it again with --max_seq_length {limit}"
        )


def length_limit(args: TrainArgs, config: Config) -> int:
    """Return how many tokens a sample may have."""
    return min(args.batch.max_seq_length or config.block_size, config.block_size)


def check_vocabulary(config: Config, token_ids: Iterable[Tensor]) -> None:
    """Refuse data whose token ids the model's embedding does not have."""
    largest = max(int(ids.max()) for ids in token_ids)
    if largest >= config.padded_vocab_size:
        raise UserError(
            f"the tokenizer gives the id {largest}, but the model's embedding has {config.padded_vocab_size} rows; "
            "are both of the same checkpoint?"
        )
