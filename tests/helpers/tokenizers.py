"""Train tiny tokenizers."""

import io
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello world, this is a small text about tokens.",
    "The quick brown fox jumps over the lazy dog 1234567890 times.",
    "def f(x):\n    return x + 1\n\n\tif x: pass",
    "Ein süßer Apfel, café, naïve, 日本語 中文 too.",
] * 30


def bpe_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of 300 tokens with an end token and no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(["the cat and the dog", "Below is an instruction that describes a task"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def sentencepiece_model() -> bytes:
    """Return the contents of a tokenizer.model of 420 BPE pieces with byte fallback, trained on CORPUS."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.999, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
