"""Memory that preparing a large file of rows takes.

    python benchmarks/prepare_memory.py --gigabytes 5

Makes a .jsonl of rows of different lengths, prepares it in a process of its own, with deduplication and a validation
split, and prints the peak of that process's resident memory (ru_maxrss: interpreter, libraries and mapped files
included), which should not depend on the size. Needs about four times the size on disk, which it gives back.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_gpt.cli import PositiveFloat, PositiveInt, run

gigabytes: PositiveFloat = 5.0  # size of the file
checkpoint_dir: Path | None = None  # folder whose tokenizer is used (null: a small one of bytes and a thousand words)
work_dir: Path | None = None  # where to put all (null: the system's place for temporary files)
row_length: PositiveInt = 2000  # characters of a row, in the mean; up to ten times that

SCRIPT = Path(__file__).parent.parent / "scripts" / "prepare_json.py"


def words(generator: random.Random) -> list[str]:
    syllables = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
    return ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(5000)]


def make_rows(path: Path, size: float, mean: int, generator: random.Random) -> int:
    """A .jsonl of at least `size` bytes, one row in a hundred a copy of one before; returns how many rows."""
    vocabulary, rows = words(generator), 0
    texts = [" ".join(generator.choices(vocabulary, k=round(mean / 7 * min(10, generator.expovariate(1))) + 2))
             for _ in range(5000)]  # fmt: skip
    with open(path, "w") as file:
        while file.tell() < size:
            n = rows - 1 if rows % 100 == 99 else rows
            row = {"instruction": f"Say {n}.", "input": texts[n % 4999], "output": f"{texts[n % 4997]} {n}."}
            file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def make_checkpoint(folder: Path, generator: random.Random) -> None:
    """A tokenizer and the configuration that it goes with; weights are not needed."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.train_from_iterator([" ".join(words(generator))], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    config = {"model_type": "llama", "vocab_size": 2000, "max_position_embeddings": 65536, **sizes}
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    with tempfile.TemporaryDirectory(dir=work_dir) as work:
        folder, generator = Path(work), random.Random(0)
        rows = make_rows(folder / "rows.jsonl", gigabytes * 1e9, row_length, generator)
        if checkpoint_dir is None:
            make_checkpoint(folder / "checkpoint", generator)
        argv = [sys.executable, SCRIPT, "--checkpoint_dir", checkpoint_dir or folder / "checkpoint"]
        argv += ["--data_path", folder / "rows.jsonl", "--out_dir", folder / "data"]
        argv += ["--prompt_style", "chatml", "--deduplicate", "true"]
        start = time.perf_counter()
        subprocess.run(list(map(str, argv)), stdout=subprocess.DEVNULL, check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        audit = json.loads((folder / "data" / "data.json").read_text())["audit"]
        result = {"jsonl_bytes": (folder / "rows.jsonl").stat().st_size, "rows": rows}
    result |= {"tokens": sum(split["tokens"] for split in audit.values()), "audit": audit}
    print(json.dumps({**result, "seconds": round(seconds, 1), "peak_resident_bytes": peak}, indent=2))


if __name__ == "__main__":
    run(main)
