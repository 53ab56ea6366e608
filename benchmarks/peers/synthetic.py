"""A checkpoint with random weights and random rows of an instruction data set's lengths, for speed without downloads.

    python synthetic.py '{"model": "falcon-7b", "fields": {}, "rows": 64, "seed": 1337, "folder": "FOLDER"}'

Lengths are lognormal, cut to 16 and 1079: median 91, mean 107, 99th percentile 340, which is about what Alpaca has
under Falcon's tokenizer. The last half of each row is supervised.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as Tokens
from tokenizers import models
from transformers import AutoConfig, AutoModelForCausalLM

from lit_gpt.conversion import hf as hf_files
from lit_gpt.conversion import hf_shards
from lit_gpt.data import dataset
from lit_gpt.data.audit import Audit
from lit_gpt.data.folder import SPLITS
from lit_gpt.data.split_writer import SampleStore
from lit_gpt.families import registry
from lit_gpt.files import new_folder
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

MEDIAN, SIGMA, SHORTEST, LONGEST = 91, 0.57, 16, 1079


def make_checkpoint(folder: Path, hf: dict, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    Tokens(models.WordLevel({"<end>": 0}, unk_token="<end>")).save(str(folder / "tokenizer.json"))
    hf_files.convert(folder, hf_shards.StoredWeights(folder))


def lengths_like_alpaca(n: int, longest: int, generator: torch.Generator) -> list[int]:
    lengths = torch.empty(n).normal_(math.log(MEDIAN), SIGMA, generator=generator).exp().round().long().tolist()
    return [min(max(length, SHORTEST), LONGEST, longest) for length in lengths]


def write_split(path: Path, rows: int, vocabulary: int, longest: int, generator: torch.Generator) -> Audit:
    """Write random samples as a split's file, and return their audit."""
    store, audit = SampleStore(path.parent), Audit()
    for n in lengths_like_alpaca(rows, longest, generator):
        ids = torch.randint(vocabulary, (n,), generator=generator, dtype=torch.int32)
        store.append(ids.tolist(), [i >= n // 2 for i in range(n)])
        audit.lengths[n] += 1
        audit.supervised += n - max(1, n // 2)
    store.write(path, np.arange(rows))
    store.remove()
    return audit


def main(model: str, fields: dict, rows: int, seed: int, folder: str) -> None:
    hf = registry.preset(model) | fields
    checkpoint_dir = Path(folder) / "checkpoint"
    make_checkpoint(checkpoint_dir, hf, seed)
    generator = torch.Generator().manual_seed(seed)
    longest = hf.get("max_position_embeddings", 2048)
    with new_folder(Path(folder) / "data") as destination:
        audits = {
            name: write_split(destination / f"{name}.safetensors", n, hf["vocab_size"], longest, generator)
            for name, n in zip(SPLITS, (rows, 4), strict=True)
        }
        style = PromptStyle("plain", "{{ messages[0]['content'] }}", template_writes_bos=False)
        dataset.write_meta(destination, audits, Tokenizer(checkpoint_dir), style)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
