"""A checkpoint with random weights and random rows of an instruction data set's lengths, for speed without downloads.

    python synthetic.py '{"model": "falcon-7b", "fields": {}, "rows": 64, "seed": 1337, "folder": "FOLDER"}'

Lengths are lognormal, cut to 16 and 1079: median 91, mean 107, 99th percentile 340, which is about what Alpaca has
under Falcon's tokenizer. The last half of each row is supervised.
"""

import json
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer as Tokens
from tokenizers import models
from transformers import AutoConfig, AutoModelForCausalLM

from lit_gpt import data, families, hf_files
from lit_gpt.prompts import PromptStyle
from lit_gpt.tokenizer import Tokenizer

MEDIAN, SIGMA, SHORTEST, LONGEST = 91, 0.57, 16, 1079


def make_checkpoint(folder: Path, hf: dict, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    Tokens(models.WordLevel({"<end>": 0}, unk_token="<end>")).save(str(folder / "tokenizer.json"))
    hf_files.convert(folder, hf_files.StoredWeights(folder))


def make_split(rows: int, vocabulary: int, longest: int, generator: torch.Generator) -> data.Split:
    split = data.Split()
    for n in torch.empty(rows).normal_(math.log(MEDIAN), SIGMA, generator=generator).exp().round().long().tolist():
        n = min(max(n, SHORTEST), longest)
        split.tokens.append(torch.randint(vocabulary, (n,), generator=generator, dtype=torch.int32))
        split.supervised.append((torch.arange(n) >= n // 2).to(torch.uint8))
        split.audit.lengths.append(n)
    return split


def main(model: str, fields: dict, rows: int, seed: int, folder: str) -> None:
    hf = families.preset(model) | fields
    checkpoint_dir = Path(folder) / "checkpoint"
    make_checkpoint(checkpoint_dir, hf, seed)
    generator = torch.Generator().manual_seed(seed)
    longest = min(LONGEST, hf.get("max_position_embeddings", 2048))
    splits = {
        name: make_split(n, hf["vocab_size"], longest, generator) for name, n in (("train", rows), ("validation", 4))
    }
    data.write(Path(folder) / "data", splits, Tokenizer(checkpoint_dir), PromptStyle("plain", "", own_bos=False))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
