"""Check that a finetune is what it claims, on your own checkpoint, data and settings: a line with a figure for each.

    python scripts/check.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca --method lora
    python scripts/check.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth

Takes every flag of finetune/METHOD.py too; a finetuned file brings its method and settings. Ends with 1 if a check
fails. A model that fits into memory in float32 is checked in that, which shows what rounding would hide.
"""

import json as json_format
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.folder import check_inputs, quantization
from lit_gpt.cli import peek, run
from lit_gpt.data.folder import read_record
from lit_gpt.errors import UsageError
from lit_gpt.methods.hyperparameters import refuse_other_settings
from lit_gpt.methods.registry import config_class, entry, recorded_config
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_quantized

method: str = "lora"  # Check this method, by the name of its script in finetune/, whose flags are taken too.
finetuned_path: Path | None = None  # Check what a script of finetune/ wrote (null: the method as it starts).
json: bool = False  # Print the findings as JSON.


def main(config: Any, args: TrainArgs) -> None:
    folder, path = args.paths.checkpoint_dir, args.paths.finetuned_path
    check_file(config, folder, path)
    read_record(args.paths.data_dir)
    stored = quantization(folder) or {"quantize": args.memory.quantize}
    check_quantized(args, not entry(method).attaches, stored["quantize"])
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.methods.finetuned_file import read_file
    from lit_gpt.methods.finetuned_model import method_of
    from lit_gpt.methods.registry import make_method
    from lit_gpt.training.selfcheck.finding import as_json, print_findings, require_all
    from lit_gpt.training.setup import check

    base, made = BaseCheckpoint.open(folder, args.memory.quantize), make_method(method, config)
    if path:
        record = read_file(path, None, base.fingerprint)
        base, made = base.quantized_as(record.get("quantize"), path), method_of(record, path)
    found = check(args, made, base)
    findings = list(found) if json else print_findings(found)
    if json:
        print(json_format.dumps(as_json(findings), indent=2))
    require_all(findings)


def check_file(config: Any, folder: Path, path: Path | None) -> None:
    """Refuse a file that is not of the method and the settings which are given, if they are."""
    record, given = check_inputs(folder, path), peek("method", "")
    if not record or not path:
        return
    if given and given != record["method"]:
        raise UsageError(
            f"--method {given}: {path} was trained by the method {record['method']}; leave that out, the file has it"
        )
    if config != type(config)():  # the file brings its settings, where none are given
        refuse_other_settings(recorded_config(record, path), config, path)


if __name__ == "__main__":
    run(main, lambda: (config_class(peek("method", method)), TrainArgs), aliases=ALIASES)
