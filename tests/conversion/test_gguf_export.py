"""GGUF files written here, read back by the gguf package, by transformers, by our own reader and by llama.cpp."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GlmConfig,
    GptOssConfig,
    Llama4TextConfig,
    Ministral3Config,
    NemotronHConfig,
    Olmo3Config,
    OlmoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)  # fmt: skip

from helpers.compare import off
from helpers.exports import EXPORT
from helpers.gguf_files import (
    PLAIN,
    SPLITS,
    byte_level,
    byte_level_fields,
    gguf_tensors,
    model_fields,
    sentencepiece_fields,
    sentencepiece_proto,
    tiny,
    write_gguf,
)
from helpers.llama_cpp import LlamaCpp
from helpers.paths import SHARED
from helpers.tiny_models import make_base
from helpers.tokenizers import bpe_tokenizer
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import export, hf, hf_shards, readers
from lit_gpt.conversion.gguf import importer, writer
from lit_gpt.conversion.gguf.layout import layout_of
from lit_gpt.conversion.gguf.reader import GGUFFile
from lit_gpt.conversion.gguf.tokenizer import Vocabulary, build_tokenizer
from lit_gpt.errors import UserError
from lit_gpt.generation.engine import generate
from lit_gpt.model.config import Config
from lit_gpt.text.prompt_style import PromptStyle

LAYOUTS = [
    ("llama", "llama"), ("llama", "llama3"), ("llama", "linear"), ("llama", "yarn"), ("llama", "biased"),
    ("llama", "smollm2"), ("llama", "mistral"), ("falcon", "7b"), ("falcon", "40b"), ("falcon", "11b"),
    ("gpt_neox", "pythia"), ("gpt_neox", "redpajama"), ("qwen", "qwen2"), ("qwen", "qwen3"), ("gemma", "gemma"),
    ("gemma", "gemma2"), ("gemma", "gemma3"), ("phi3", "phi3"), ("olmo2", "olmo2"), ("granite", "granite"),
    ("smollm3", "smollm3"),
]  # fmt: skip
SIZE = dict(
    vocab_size=320, hidden_size=64, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=None, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
TWO = dict(SIZE, num_hidden_layers=2)
WINDOW = dict(SIZE, head_dim=24, sliding_window=5, query_pre_attn_scalar=24)
THREE_IN_FOUR = dict(
    SIZE, num_hidden_layers=4, sliding_window=5, layer_types=["sliding_attention"] * 3 + ["full_attention"]
)
EXPERTS = dict(TWO, moe_intermediate_size=24, num_experts_per_tok=2, head_dim=24)
GEMMA_4 = dict(
    SIZE, num_hidden_layers=4, sliding_window=5, head_dim=16, global_head_dim=32, final_logit_softcapping=30.0,
    layer_types=2 * ["sliding_attention", "full_attention"], hidden_size_per_layer_input=0,
)  # fmt: skip
GEMMA_4_LARGE = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": PLAIN_ROPE,
}
LATENT = dict(
    TWO, num_hidden_layers=3, num_key_value_heads=4, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8,
    v_head_dim=16, moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=2, routed_scaling_factor=1.5,
    first_k_dense_replace=1, n_shared_experts=2,
)  # fmt: skip
DELTA_NET = dict(
    SIZE, num_hidden_layers=4, head_dim=256, partial_rotary_factor=0.25, linear_key_head_dim=16,
    linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, full_attention_interval=2,
)  # fmt: skip
SHARED_EXPERT = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=32)
AS_LLAMA_CPP_HAS_THEM = {  # where it takes something for granted
    "gemma2": lambda: Gemma2Config(
        **WINDOW, num_hidden_layers=2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**WINDOW, num_hidden_layers=6, rope_parameters=ROPES),
    "smollm3": lambda: SmolLM3Config(**SIZE, num_hidden_layers=4),
    "cohere2": lambda: Cohere2Config(**THREE_IN_FOUR),
    "olmo3": lambda: Olmo3Config(
        **THREE_IN_FOUR, rope_parameters={"full_attention": YARN, "sliding_attention": PLAIN_ROPE}
    ),
    "exaone4": lambda: Exaone4Config(**TWO, sliding_window=None, layer_types=["full_attention"] * 2),
    "glm": lambda: GlmConfig(**TWO, head_dim=16),
    "olmoe": lambda: OlmoeConfig(**TWO | dict(num_key_value_heads=4), num_experts=6, num_experts_per_tok=3),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS, num_experts=5, norm_topk_prob=True),
    "glm4_moe": lambda: Glm4MoeConfig(
        **EXPERTS, n_routed_experts=6, n_group=1, topk_group=1, routed_scaling_factor=1.5, attention_bias=True,
        use_qk_norm=True, num_nextn_predict_layers=0,
    ),
    "large": lambda: Gemma4TextConfig(**GEMMA_4 | GEMMA_4_LARGE),
    "experts": lambda: Gemma4TextConfig(
        **GEMMA_4 | GEMMA_4_LARGE, enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=24
    ),
    "small": lambda: Gemma4TextConfig(
        **GEMMA_4 | dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=320), num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    "llama4": lambda: Llama4TextConfig(
        **TWO | dict(num_hidden_layers=4, intermediate_size=24), intermediate_size_mlp=40, num_local_experts=5,
        head_dim=16, interleave_moe_layer_step=2,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **TWO | dict(intermediate_size=32), head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
        rope_parameters=YARN | {"truncate": False},
    ),
    "deepseek_v2": lambda: DeepseekV2Config(**LATENT | dict(num_hidden_layers=26), q_lora_rank=None),
    "deepseek_v3": lambda: DeepseekV3Config(
        **LATENT, q_lora_rank=32, n_group=2, topk_group=1, num_nextn_predict_layers=0,
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "ministral3": lambda: Ministral3Config(
        **TWO, head_dim=16, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    ),
    "falcon_h1": lambda: FalconH1Config(
        **TWO, head_dim=16, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1,
        embedding_multiplier=3.0, lm_head_multiplier=0.3, key_multiplier=0.6, attention_in_multiplier=1.2,
        attention_out_multiplier=0.7, ssm_in_multiplier=1.5, ssm_out_multiplier=0.4, mlp_multipliers=[0.8, 0.5],
        ssm_multipliers=[0.7, 0.9, 1.3, 0.6, 0.8], mamba_rms_norm=True, mamba_norm_before_gate=False,
    ),
    "nemotron_h_moe": lambda: NemotronHConfig(
        **SIZE, head_dim=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32,
        routed_scaling_factor=1.5, layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
    ),
    "qwen3_next": lambda: Qwen3NextConfig(**DELTA_NET | SHARED_EXPERT),
    "qwen3_5": lambda: Qwen3_5TextConfig(**DELTA_NET, tie_word_embeddings=True),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**DELTA_NET | SHARED_EXPERT),
}  # fmt: skip
FURTHER = [  # of the newer families, through what is quick
    ("arcee", "arcee"), ("bloom", "bloom"), ("cohere", "cohere"), ("cohere", "cohere2"), ("ernie", "ernie4_5"),
    ("deepseek", "deepseek_v2"), ("deepseek", "deepseek_v3"), ("glm4_moe_lite", "glm4_moe_lite"),
    ("ministral", "ministral3"), ("gemma4", "large"), ("gemma4", "experts"), ("gemma4", "small"), ("llama4", "llama4"),
    ("exaone4", "exaone4"), ("falcon_h1", "falcon_h1"), ("falcon_mamba", "falcon_mamba"),
    ("glm4", "glm"), ("glm4", "glm4"), ("glm4_moe", "glm4_moe"), ("gpt2", "gpt2"),
    ("gpt_bigcode", "multi-head"), ("gpt_bigcode", "multi-query"), ("gpt_oss", "gpt_oss"),
    ("granite_hybrid", "granite_hybrid"), ("granite_hybrid", "granite_hybrid-experts"),
    ("granite_hybrid", "granite_hybrid-rope"), ("granite_moe", "granitemoe"), ("nemotron_h", "nemotron_h"),
    ("nemotron_h", "nemotron_h_moe"), ("qwen3_next", "qwen3_next"), ("qwen3_5", "qwen3_5"),
    ("qwen3_5_moe", "qwen3_5_moe"),
    ("hunyuan", "hunyuan"), ("lfm2", "lfm2"), ("mixtral", "mixtral"), ("mpt", "mpt"), ("olmo", "clipped"),
    ("olmo3", "olmo3"), ("olmoe", "olmoe"), ("phi", "phi2"), ("qwen_moe", "qwen3_moe"), ("qwen2_moe", "qwen2_moe"),
    ("seed_oss", "seed_oss"), ("stablelm", "1_6b"), ("stablelm", "12b"), ("starcoder2", "starcoder2"),
]  # fmt: skip
NAMES = ["-".join(names) for names in LAYOUTS + FURTHER]
TOOL = SHARED / "tools" / "make_smollm2.py"
READ_BY_TRANSFORMERS = [
    "llama", "llama3", "linear", "yarn", "smollm2", "mistral", "7b", "qwen2", "gemma3", "bloom", "lfm2", "starcoder2",
]  # fmt: skip


def make(folder: Path, family: str, layout: str) -> Path:
    if layout not in AS_LLAMA_CPP_HAS_THEM:
        return make_base(folder, family, layout)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AS_LLAMA_CPP_HAS_THEM[layout]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    bpe_tokenizer(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return folder


def tokens(folder: Path) -> torch.Tensor:
    """Ids to compare logits on, within the window if there is one."""
    config = load_model(folder).config
    length = 40 if config.family in ("gemma", "gemma4") else config.sliding_window or 40
    return torch.randint(320, (2, length), generator=torch.Generator().manual_seed(3))


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


@pytest.mark.parametrize(("family", "layout"), LAYOUTS + FURTHER, ids=NAMES)
def test_out_and_in_again_is_bit_identical(tmp_path, family, layout):
    """All but what the file has another number of, which rounds it: norms' weights plus 1, and a recurrence's decay
    for its logarithm. Where the file has products of weights and factors, they are the model's, whose factors are 1."""
    folder = make(tmp_path / "base", family, layout)
    state, config = torch.load(folder / "lit_model.pth"), Config.from_checkpoint(folder)
    written = writer.write(tmp_path / "a.gguf", folder, state, "fp32", None)
    found = importer.convert(tmp_path / "a.gguf", tmp_path / "in", torch.float32)
    back = torch.load(tmp_path / "in" / "lit_model.pth")
    assert back.keys() == state.keys()
    assert found.family == (config.family if config.family != "glm4_moe_lite" else "deepseek")
    readers.check_same(found, replace(config, **written.folded), tmp_path / "a.gguf")
    if written.folded:
        idx = tokens(folder)
        assert off(load_model(tmp_path / "in")(idx), load_model(folder)(idx)) < 1e-5
        writer.write(tmp_path / "b.gguf", tmp_path / "in", back, "fp32", None)
        first, second = (GGUFFile(tmp_path / name) for name in ("a.gguf", "b.gguf"))
        assert all(off(first.read(name), second.read(name)) < 1e-7 for name in first.tensors)
        return
    for name, tensor in state.items():
        rounds = name.endswith("A_log") or written.norm_offset and ("norm" in name or name == "ln_f.weight")
        limit = 1e-7 * tensor.abs().max().clamp(min=1) if rounds else 0
        assert (tensor - back[name]).abs().max() <= limit, name


FULLY = LAYOUTS + [names for names in FURTHER if names[1] in READ_BY_TRANSFORMERS]


@pytest.mark.parametrize(("family", "layout"), FULLY, ids=["-".join(names) for names in FULLY])
@torch.no_grad()
def test_the_file_holds_the_model(tmp_path, monkeypatch, family, layout):
    """float32: what the gguf package reads, under its own names, are the tensors of transformers, rotations apart; and
    the logits of who reads the whole are those of the source."""
    folder = make(tmp_path / "base", family, layout)
    if layout == "phi3":  # its padding id is beyond so few rows
        monkeypatch.setattr(readers, "missing", lambda *packages: list(packages))
    found = export.to_gguf(folder, tmp_path / "out", "fp32")
    assert found["reader"] == ("transformers" if layout in READ_BY_TRANSFORMERS else "Lit-GPT")
    path, idx = only_file(tmp_path / "out"), tokens(folder)
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    source = hf_shards.StoredWeights(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in source if family == "llama" else ():
        if "q_proj" not in name and "k_proj" not in name:
            assert torch.equal(stored[names.get_name(name, (".weight", ".bias"))], source[name]), name
    expected = load_model(folder)(idx)
    own = readers.own_gguf(path, load_model(folder).config, torch.float32)
    assert off(own.logits(idx), expected) < 1e-6
    if layout in READ_BY_TRANSFORMERS:
        theirs = readers.read_gguf(path, folder, torch.float32)
        assert torch.equal(theirs.logits(idx), AutoModelForCausalLM.from_pretrained(folder)(idx).logits)


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 1e-3), ("bf16", 1e-2), ("q8_0", 3e-2)])
@torch.no_grad()
def test_rounded(tmp_path, dtype, limit):
    """Matrices are what the gguf package rounds them to; rows that do not divide into blocks are float16."""
    folder = make_base(tmp_path / "base", "llama", "llama", num_hidden_layers=1)
    export.to_gguf(folder, tmp_path / "out", dtype)
    path, idx = only_file(tmp_path / "out"), tokens(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=path.name)
    assert 1e-6 < off(theirs(idx).logits, load_model(folder)(idx)) < limit
    source, file, kind = hf_shards.StoredWeights(folder), gguf.GGUFReader(path), writer.KINDS[dtype]
    for tensor in file.tensors:
        if len(tensor.shape) == 1:
            assert tensor.tensor_type == Kind.F32
        if tensor.name == "blk.0.ffn_down.weight":  # rows of 112: no blocks of 32
            assert tensor.tensor_type == (Kind.F16 if dtype == "q8_0" else kind)
        if tensor.name == "blk.0.ffn_up.weight":
            expected = dequantize(quantize(source["model.layers.0.mlp.up_proj.weight"].numpy(), kind), kind)
            assert tensor.tensor_type == kind and (dequantize(tensor.data, kind) == expected).all()
    assert file.fields["general.file_type"].contents() == {"fp16": 1, "bf16": 32, "q8_0": 7}[dtype]


def converted(tmp_path: Path, vocabulary: dict) -> Path:
    """A checkpoint folder made from a GGUF file with these fields."""
    model = tiny()
    fields = model_fields(model.config) | vocabulary
    importer.convert(
        write_gguf(tmp_path / "a.gguf", fields, gguf_tensors(model, Kind.F32)), tmp_path / "c", torch.float32
    )
    return tmp_path / "c"


@pytest.mark.parametrize("pre", list(SPLITS))
def test_a_file_written_again_says_the_same(tmp_path, pre):
    """GGUF to a folder and back: all metadata that is read, and the tensors, bit for bit."""
    vocabulary = byte_level_fields(byte_level(pre), pre)
    folder = converted(tmp_path, vocabulary)
    export.to_gguf(folder, tmp_path / "out", None)
    before, after = GGUFFile(tmp_path / "a.gguf"), GGUFFile(only_file(tmp_path / "out"))
    n = len(vocabulary["tokenizer.ggml.tokens"])
    for key, value in before.fields.items():
        found = after.fields.get(key, 0 if key == "llama.expert_count" else None)
        assert (found[:n] if key.endswith((".tokens", ".token_type")) else found) == value, key
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    """Scores made of ranks split as those of the model do."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_proto())
    given = sentencepiece_fields(model) | {"tokenizer.ggml.add_space_prefix": prefix}
    folder = converted(tmp_path, given)
    export.to_gguf(folder, tmp_path / "out", None)
    before, after = GGUFFile(tmp_path / "a.gguf"), GGUFFile(only_file(tmp_path / "out"))
    old, new = (build_tokenizer(file, Vocabulary(file)) for file in (before, after))
    assert all(old.encode(text).ids == new.encode(text).ids for text in [*PLAIN, "<|im|>Hello</s> a<tool>b"])
    n = model.get_piece_size()
    for key in ("tokens", "token_type"):
        assert after.fields[f"tokenizer.ggml.{key}"][:n] == before.fields[f"tokenizer.ggml.{key}"]
    assert after.fields["tokenizer.ggml.unknown_token_id"] == 0


def edit(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


REFUSED = {
    "a family without a layout": (("gpt_neox", "tied"), None, ["gptneox has a head of its own"]),
    "windows elsewhere": (("gemma", "gemma3"), None, ["gemma3 has no window in each 6th layer"]),
    "other scores": (("gemma", "gemma2"), None, ["gemma2 ties its head, and scales scores"]),
    "a rotary scaling": (("phi3", "longrope"), None, ["rotary scaling with", "llama.cpp"]),
    "a family without a layout at all": (
        ("apertus", "apertus"),
        None,
        ["the apertus family has no layout of llama.cpp"],
    ),
    "biases": (("falcon", "multi-head"), None, ["neither ALiBi, biases"]),
    "activation": (
        ("llama", "llama"),
        lambda d: edit(d / "lit_config.json", lambda c: c.update(activation="gelu")),
        ["llama with silu, not gelu"],
    ),
    "splits": (
        ("llama", "llama"),
        lambda d: edit(d / "tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Whitespace"})),
        ["tokenizer.json: splits text", "smollm"],
    ),
    "normalizer": (
        ("llama", "llama"),
        lambda d: edit(d / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        ["normalizer, Lowercase"],
    ),
    "more tokens than rows": (
        ("llama", "llama"),
        lambda d: edit(d / "tokenizer.json", lambda t: t["model"]["vocab"].update(zzz=400)),
        ["the id 400", "320 rows"],
    ),
    "no tokenizer": (("llama", "llama"), lambda d: (d / "tokenizer.json").unlink(), ["expected tokenizer.json"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_know_is_refused(cli, tmp_path, case):
    layout, spoil, words = REFUSED[case]
    folder = make_base(tmp_path / "base", *layout)
    if spoil:
        spoil(folder)
    cli(EXPORT, checkpoint_dir=folder, out_dir=tmp_path / "out", format="gguf").refused(*words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_family_without_a_layout_is_refused(tmp_path, monkeypatch):
    from lit_gpt.families import llama

    folder = make_base(tmp_path / "base")
    monkeypatch.delattr(llama, "gguf")
    with pytest.raises(UserError, match="the llama family has no layout of llama.cpp"):
        export.to_gguf(folder, tmp_path / "out", None)


def test_values_beyond_float16_are_refused(tmp_path):
    folder = make_base(tmp_path / "base")
    state = torch.load(folder / "lit_model.pth")
    state["h.0.mlp.proj.weight"][0, 0] = 1e5
    torch.save(state, folder / "lit_model.pth")
    with pytest.raises(UserError, match="blk.0.ffn_down.weight: holds values beyond float16"):
        export.to_gguf(folder, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_other_metadata_is_refused(tmp_path, monkeypatch):
    """The rotation's base of another model, which 24 tokens hardly show."""
    real = writer.metadata
    monkeypatch.setattr(writer, "metadata", lambda *a: real(*a) | {"llama.rope.freq_base": 10001.0})
    monkeypatch.setattr(readers, "missing", lambda *packages: list(packages))
    with pytest.raises(UserError, match="says rope_base 10001.0 for 10000.0"):
        export.to_gguf(make_base(tmp_path / "base", "llama", "llama"), tmp_path / "out", None)


def test_a_window_cuts_the_context(tmp_path, capsys):
    export.to_gguf(make_base(tmp_path / "base", "llama", "mistral"), tmp_path / "out", None)
    assert "the context is cut to 5 tokens" in capsys.readouterr().out
    assert GGUFFile(only_file(tmp_path / "out")).fields["llama.context_length"] == 5


# --- llama.cpp itself, where xllamacpp is installed


@pytest.mark.parametrize(("family", "layout"), LAYOUTS + FURTHER, ids=NAMES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(tmp_path, family, layout):
    """The probabilities of the next token. Its GELU is the approximation by tanh, in a table of float16."""
    pytest.importorskip("xllamacpp")
    folder = make(tmp_path / "base", family, layout)
    state = torch.load(folder / "lit_model.pth")
    writer.write(tmp_path / "a.gguf", folder, state, "fp32", None)
    theirs, model = LlamaCpp(tmp_path / "a.gguf"), load_model(folder)
    window = None if layout_of(model.config).keeps_window else model.config.sliding_window
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        idx = torch.randint(3, 320, (1, (window or 40) - 1), generator=generator)
        if (found := theirs.logprobs(idx[0].tolist(), 320)) is not None:
            expected = model(idx)[0, -1].log_softmax(-1)
            tanh = family in ("falcon", "gpt_neox", "gpt2", "gpt_bigcode", "mpt")
            assert off(found, expected) < (2e-3 if tanh else 1e-3)
            return
    pytest.fail("the likeliest token ended the text each time")


@pytest.mark.parametrize("pre", list(SPLITS))
def test_llama_cpp_splits_texts_alike(tmp_path, pre):
    pytest.importorskip("xllamacpp")
    tokenizer = byte_level(pre)
    model = tiny(vocab_size=tokenizer.get_vocab_size())
    fields = model_fields(model.config) | byte_level_fields(tokenizer, pre)
    theirs = LlamaCpp(write_gguf(tmp_path / "a.gguf", fields, gguf_tensors(model, Kind.F32)))
    for text in PLAIN:
        if "\0" not in text:
            assert theirs.tokens(text) == tokenizer.encode(text).ids, text


RECURRENT = [names for names in FURTHER if names[0] in (
    "falcon_h1", "falcon_mamba", "granite_hybrid", "lfm2", "nemotron_h", "qwen3_5", "qwen3_next"
)]  # fmt: skip


@pytest.mark.parametrize(("family", "layout"), RECURRENT, ids=["-".join(names) for names in RECURRENT])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@torch.no_grad()
def test_llama_cpp_carries_the_same_state(tmp_path, family, layout, dtype):
    """Greedy tokens after a prompt, one by one; rounded weights are those of the file read back."""
    pytest.importorskip("xllamacpp")
    folder = make(tmp_path / "base", family, layout)
    writer.write(tmp_path / "a.gguf", folder, torch.load(folder / "lit_model.pth"), dtype, None)
    importer.convert(tmp_path / "a.gguf", tmp_path / "in", torch.float32)
    theirs, model = LlamaCpp(tmp_path / "a.gguf"), load_model(tmp_path / "in")
    ids = torch.randint(3, 320, (12,), generator=torch.Generator().manual_seed(5)).tolist()
    found = [each["id"] for each in theirs.complete(ids, 8, 1)["logprobs"]["content"]]
    ours = iter(generate(model, ids, 8, temperature=0))
    assert len(found) > 4 and all(token in ours for token in found)  # it leaves out bytes that make no character


@pytest.mark.subprocess
@pytest.mark.skipif(
    not (SHARED / "tools" / "make_smollm2.py").exists(), reason="the tool that makes the model is absent"
)
def test_llama_cpp_writes_the_same_text(tmp_path):
    """20 tokens of SmolLM2-135M, greedily, through its own rendering of the chat template."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, TOOL, folder], check=True, capture_output=True)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    export.to_gguf(folder, tmp_path / "out", "fp32")
    theirs = LlamaCpp(only_file(tmp_path / "out"))
    model, tokenizer = load_model(folder, torch.float32), Tokenizer(folder)
    style = PromptStyle.from_checkpoint(folder, tokenizer)
    for question in ("Name three colours.", "Why is the sky blue? 12345 🙂"):
        messages = [{"role": "user", "content": question}]
        ids = style.encode_prompt(messages, tokenizer)
        ours = tokenizer.decode(list(generate(model, ids, 20, temperature=0, stop_ids=style.stop_ids)))
        assert theirs.chat(messages, 20) == ours and len(ours) > 40
