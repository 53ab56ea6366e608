"""Tell what a finetune will need, before it starts and without any weights.

    python scripts/plan.py --model falcon-7b --method lora --device cuda --memory_gb 24

Takes every flag of finetune/METHOD.py too. The training step is run on tensors without contents, so the figures are
those of this code; a GPU holds about half a gigabyte besides, and its allocator some per cent.
"""

import json as json_format
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lit_gpt.cli import PositiveFloat, run

model: str | None = None  # preset, such as falcon-7b (null: the model of checkpoint_dir)
method: Literal["lora", "adapter", "adapter_v2", "full"] = "lora"  # whose flags are taken besides these
device: Literal["cpu", "cuda"] = "cuda"  # what to plan for; it need not be here
memory_gb: PositiveFloat | None = None  # of each device, in 1e9 bytes: also tell which settings fit
json: bool = False  # print figures as JSON, in bytes


def main(hp: SimpleNamespace) -> None:
    from dataclasses import asdict, replace

    from lit_gpt.checkpoints import folder
    from lit_gpt.families.registry import config_from_name
    from lit_gpt.model.config import Config
    from lit_gpt.training.checks import check_quantized
    from lit_gpt.training.memory_plan import plan_flags

    config = config_from_name(hp.model) if hp.model else Config.from_checkpoint(hp.checkpoint_dir)
    stored = None if hp.model else folder.quantization(hp.checkpoint_dir)
    quantize = stored["quantize"] if stored else hp.quantize
    finetune_method = replace(METHOD["method"](hp), quantize=quantize)
    check_quantized(hp, finetune_method, quantize)
    found, lengths, kind = plan_flags(config, finetune_method, hp)
    if hp.json:
        print(
            json_format.dumps(
                asdict(found) | {"train": found.train, "tokens": sum(lengths), "activation_checkpointing": kind},
                indent=2,
            )
        )
        return
    print(f"{hp.method} on {hp.model or hp.checkpoint_dir}, one of {hp.devices * hp.num_nodes} {hp.device} devices")
    print(f"parameters {found.parameters:,}, of which {found.trainable:,} train")
    print(f"a packed row of {len(lengths)} x {lengths[0]} tokens, every token supervised")
    print(f"activation checkpointing: {kind}")
    for name, value in table(found):
        print(f"  {name:<42}{value / 1e9:9.3f} GB")
    if hp.memory_gb:
        fits(config, finetune_method, hp)


def table(found: Any) -> list[tuple[str, int]]:
    rows = [(name, getattr(found, name)) for name in ("weights", "gradients", "optimizer", "activations")]
    rows += [(f"peak of {name}", getattr(found, name)) for name in ("train", "evaluate", "save")]
    return rows + ([("peak of merge_lora (host, beside the file)", found.merge)] if found.merge else [])


def fits(config: Any, finetune_method: Any, hp: SimpleNamespace) -> None:
    """What larger and smaller rows would need, with each kind of activation checkpointing."""
    from lit_gpt.training.activation_checkpointing import KINDS
    from lit_gpt.training.memory_plan import plan_flags

    print(f"\nsettings and whether their peak stays within {hp.memory_gb:g} GB")
    for kind in KINDS if hp.device == "cuda" else KINDS[:-1]:
        for tokens in (16384, 8192, 4096, 2048, 1024, 512):
            change = {"activation_checkpointing": kind, "micro_batch_tokens": tokens, "micro_batch_size": None}
            found, lengths, _ = plan_flags(config, finetune_method, SimpleNamespace(**vars(hp) | change))
            if tokens < lengths[0]:
                continue  # the same row as for more tokens
            verdict = "fits" if found.peak <= hp.memory_gb * 1e9 else "does not fit"
            flags = f"--micro_batch_tokens {tokens} --activation_checkpointing {kind}"
            print(f"  {flags:<69}{found.peak / 1e9:9.3f} GB  {verdict}")


def method_script(argv: list[str]) -> dict[str, Any]:
    """The globals of finetune/METHOD.py for the `--method` of the command line."""
    given = [b for a, b in zip(argv, argv[1:], strict=False) if a == "--method"]
    given += [a.partition("=")[2] for a in argv if a.startswith("--method=")]
    path = Path(__file__).parent.parent / "finetune" / f"{(given or [method])[-1]}.py"
    return runpy.run_path(str(path)) if path.exists() else {}


if __name__ == "__main__":
    METHOD = method_script(sys.argv[1:])
    run(main, METHOD)
