"""Every family and layout against transformers: the same logits, the same tensors there and back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import family_table
from helpers.compare import TOLERANCE, in_steps, off, tokens
from helpers.paths import ROOT
from helpers.tiny_models import Tiny, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.checkpoints.folder import load_state
from lit_gpt.conversion import hf, hf_shards, weights
from lit_gpt.errors import UserError
from lit_gpt.families.registry import REFUSED, config_from_hf, config_from_name, families, preset


@torch.no_grad()
def test_logits_equal_transformers(tiny: Tiny):
    """Beyond all windows (5) and original contexts (16, 32)."""
    model, idx = load_model(tiny.folder), tokens(tiny.hf)
    expected = tiny.hf(idx).logits
    assert off(model(idx), expected) < TOLERANCE
    assert off(model(idx, last=True), expected[:, -1:]) < TOLERANCE


@torch.no_grad()
def test_cache_changes_nothing(tiny: Tiny):
    model, idx = load_model(tiny.folder), tokens(tiny.hf)
    cache = model.kv_cache(2, idx.size(1))
    found = torch.cat([model(step, cache=cache) for step in in_steps(idx)], dim=1)
    assert off(found, tiny.hf(idx).logits) < TOLERANCE


def test_round_trip_is_bit_identical(tiny: Tiny, tmp_path):
    """HF -> lit -> HF, in several shards, loaded by transformers unedited."""
    hf.export(tiny.folder, tmp_path / "hf", load_state(tiny.folder), shard_bytes=50_000)
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 1
    exported = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    original = load_file(tiny.folder / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.equal(again(tokens(tiny.hf)).logits, tiny.hf(tokens(tiny.hf)).logits)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_both_kinds(tmp_path, suffix):
    """bf16 and float32 side by side keep their dtypes; --dtype turns both."""
    model = tiny_hf_model("llama", "llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {k: t.bfloat16() if "mlp" in k else t for k, t in tensors.items()}
    (tmp_path / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weight_map = {}
    for i in range(3):
        name = f"{stem}-{i}.{suffix}"
        part = dict(list(tensors.items())[i::3])
        save_file(part, tmp_path / name) if suffix == "safetensors" else torch.save(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    state = load_state(tmp_path)
    back = dict(weights.to_hf(weights.rows(config), state))
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in tensors)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path), torch.float16)
    assert {t.dtype for t in load_state(tmp_path).values()} == {torch.float16}


@pytest.mark.parametrize("differs", [False, True])
def test_head_stored_beside_a_tied_embedding(tmp_path, differs):
    """As Falcon's published files have it. transformers uses the stored head too, and so does what is exported."""
    tiny_hf_model("falcon", "7b").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["transformer.word_embeddings.weight"] + (0.1 * torch.randn(96, 64) if differs else 0)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    assert not config.tie_embeddings
    hf.export(tmp_path, tmp_path / "hf", load_state(tmp_path))
    for folder in (tmp_path, tmp_path / "hf"):
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            assert off(load_model(tmp_path)(tokens(theirs)), theirs(tokens(theirs)).logits) < TOLERANCE


# Parameters as published, or as the sum of the tensors in the published files.
PUBLISHED = {
    "falcon-7b": 7_217_189_760,
    "falcon-rw-1b": 1_311_625_216,
    "falcon-40b": 41_835_970_560,
    "falcon-180b": 179_522_565_120,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "CodeLlama-7b": 6_738_546_688,
    "CodeLlama-13b": 13_016_028_160,
    "CodeLlama-34b": 33_743_970_304,
    "open_llama_3b": 3_426_473_600,
    "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320,
    "Llama-2-70b": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "TinyLlama-1.1B": 1_100_048_384,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Qwen2-0.5B": 494_032_768,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,  # of 4_300_079_472 with the tower that reads images
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-1_5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "Phi-3-mini-4k": 3_821_079_552,
    "Phi-3-medium-4k": 13_960_238_080,
    "Phi-3.5-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "Phi-4-mini": 3_836_021_760,
    "stablelm-3b-4e1t": 2_795_443_200,
    "stablelm-2-1_6b": 1_644_515_328,
    "OLMo-2-0425-1B": 1_484_916_736,
    "OLMo-2-1124-7B": 7_298_617_344,
    "OLMo-2-1124-13B": 13_716_198_400,
    "OLMo-2-0325-32B": 32_234_279_936,
    "granite-3.1-2b-instruct": 2_533_531_648,
    "granite-3.1-8b-instruct": 8_170_848_256,
    "SmolLM3-3B": 3_075_098_624,
    "Falcon3-1B-Base": 1_669_408_768,
    "Falcon3-3B-Base": 3_227_655_168,
    "Falcon3-7B-Base": 7_455_550_464,
    "Falcon3-10B-Base": 10_305_653_760,
    "Mistral-Nemo-Base-2407": 12_247_782_400,
    "Mistral-Small-24B-Base-2501": 23_572_403_200,
    "Olmo-3-1025-7B": 7_298_011_136,
    "Olmo-3-1125-32B": 32_233_522_176,
    "OLMo-1B-hf": 1_176_764_416,
    "OLMo-7B-hf": 6_888_095_744,
    "Seed-OSS-36B-Base": 36_151_104_512,
    "ERNIE-4.5-0.3B-PT": 360_748_032,
    "glm-4-9b-chat-hf": 9_399_951_360,
    "GLM-4-9B-0414": 9_400_279_040,
    "EXAONE-4.0-1.2B": 1_279_391_488,
    "c4ai-command-r-v01": 34_980_831_232,
    "aya-23-8B": 8_028_033_024,
    "c4ai-command-r7b-12-2024": 8_028_033_024,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024,
    "Apertus-8B-2509": 8_053_338_176,
    "nanochat-d32": 1_879_048_192,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "gpt-j-6b": 6_050_882_784,
    "starcoderbase-1b": 1_137_207_296,
    "starcoder": 15_517_456_384,
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "mpt-7b": 6_649_286_656,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Mixtral-8x22B-v0.1": 140_620_634_112,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "granite-3.0-1b-a400m-base": 1_334_628_352,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "MiniMax-M2": 228_689_748_992,
    # of 108_641_793_536 and 401_583_781_376 with the tower that reads images
    "Llama-4-Scout-17B-16E": 107_769_861_120,
    "Llama-4-Maverick-17B-128E": 400_711_848_960,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_404_352,
    "Moonlight-16B-A3B": 15_960_108_544,
    "GLM-4.7-Flash": 29_943_390_976,
    "granite-4.0-h-tiny": 6_939_037_248,
    "NVIDIA-Nemotron-3-Nano-30B-A3B": 31_577_937_344,
    "falcon-mamba-7b": 7_272_665_088,
    "LFM2-350M": 354_483_968,
    "LFM2-700M": 742_489_344,
    "LFM2-1.2B": 1_170_340_608,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name):
    with torch.device("meta"):
        assert size(GPT(config_from_name(name))) == PUBLISHED[name]


@pytest.mark.parametrize("family", families())
def test_presets_are_what_transformers_takes_them_for(family):
    """All of them: as large, also those of which no published count is at hand; and the same in the newest spelling."""
    for name, fields in family.PRESETS.items():
        theirs = AutoConfig.for_model(**fields)
        assert config_from_hf(theirs.to_dict(), name=name) == config_from_name(name)
        with torch.device("meta"):
            counts = [size(GPT(config_from_name(name))), size(AutoModelForCausalLM.from_config(theirs))]
        assert counts[0] == counts[1], name


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_table_in_the_readme_names_every_family():
    rows = re.findall(r"\| `families/(\w+)\.py` \| ([^|]+) \|", (ROOT / "README.md").read_text())
    listed = {name: tuple(re.findall(r"`(\w+)`", kinds)) for name, kinds in rows}
    assert len(rows) == len(listed)
    assert listed == {family.__name__.rpartition(".")[2]: family.MODEL_TYPES for family in families()}


def test_the_page_of_the_families_is_what_they_are():
    """`PYTHONPATH=.:tests python -m helpers.family_table` writes it anew."""
    assert family_table.PAGE.read_text(encoding="utf-8").partition(family_table.BEGIN)[2] == family_table.table()


def test_unknown_names():
    with pytest.raises(UserError, match="unknown model 'falcon7b'; did you mean falcon-7b"):
        config_from_name("falcon7b")
    with pytest.raises(UserError, match="model_type 'mamba' is not supported"):
        config_from_hf({"model_type": "mamba"})
    with pytest.raises(UserError, match="model_type 'deepseek_v32' is not supported: its tokens attend"):
        config_from_hf({"model_type": "deepseek_v32"})
    assert not REFUSED.keys() & {kind for family in families() for kind in family.MODEL_TYPES}
    with pytest.raises(UserError, match="needs the field 'hidden_size'"):
        config_from_hf({"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1})
    with pytest.raises(UserError, match="alibi"):
        config_from_hf(preset("falcon-7b") | {"alibi": True})


def test_older_names_of_config_fields():
    """As transformers 4 wrote them; and a family's default where neither old nor new field is there."""
    llama = dict(model_type="llama", num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8,
                 vocab_size=9, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})  # fmt: skip
    config = config_from_hf(llama)
    assert config.rope_base == 5e5 and config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    neox = dict(llama, model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=2e4, rope_scaling=None)
    del neox["rope_theta"]
    assert config_from_hf(neox).rotary_percentage == 0.5 and config_from_hf(neox).rope_base == 2e4
    del neox["rotary_pct"]
    assert config_from_hf(neox | {"rope_parameters": {"rope_theta": 1e4}}).rotary_percentage == 0.25


TINY = dict(
    num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, hidden_size=8, intermediate_size=8, vocab_size=9
)


def test_which_layers_have_a_window_or_positions():
    """By the lists of layers, or by the numbers that stand for them in older files."""
    gemma = dict(TINY, model_type="gemma3_text", sliding_window=6, rope_local_base_freq=2e4,
                 sliding_window_pattern=2)  # fmt: skip
    config = config_from_hf(gemma)
    assert [config.window(layer) for layer in range(4)] == [6, None, 6, None] and config.local_rope_base == 2e4
    listed = config_from_hf(gemma | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]})
    assert [listed.window(layer) for layer in range(4)] == [None, None, None, 6]
    qwen = dict(TINY, model_type="qwen2", sliding_window=6, max_window_layers=3)
    assert config_from_hf(qwen).sliding_window is None
    config = config_from_hf(qwen | {"use_sliding_window": True})
    assert [config.window(layer) for layer in range(4)] == [None, None, None, 6]
    assert config_from_hf(dict(TINY, model_type="smollm3")).unrotated_layers == [3]
    assert config_from_hf(dict(TINY, model_type="smollm3", no_rope_layers=[0, 1, 1, 0])).unrotated_layers == [0, 3]
    assert config_from_hf(dict(TINY, model_type="gemma", hidden_act="gelu")).activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types .'linear_attention'."),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "of sliding_attention"),
        ("gemma2", {"hidden_activation": "gelu_10"}, "activation 'gelu_10'"),
        ("gemma4_text", {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 0}, "no layer before has full_att"),
        (
            "gemma4_text",
            {"per_layer_config": {"3": {"head_dim": 8, "sliding_window": 2}}, "hidden_size_per_layer_input": 0},
            "per_layer_config",
        ),
        ("gemma4_text", {}, "vocab_size_per_layer_input"),
        ("gemma3n_text", {"intermediate_size": [8, 8, 8, 9]}, "intermediate_size"),
        (
            "gemma3n_text",
            {"activation_sparsity_pattern": [0.5, 0.9, 0, 0], "num_kv_shared_layers": 0},
            "activation_sparsity_pattern",
        ),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, "layer_types .'sliding_attention'."),
        ("phimoe", {"rope_scaling": {"type": "longrope", "short_mscale": 1.1, "long_mscale": 1.2}}, "'short_mscale'"),
    ],
)
def test_what_the_model_does_not_do_is_refused(kind, fields, words):
    with pytest.raises(UserError, match=words):
        GPT(config_from_hf(dict(TINY, model_type=kind, sliding_window=6) | fields))


@pytest.mark.parametrize("fields", [{"vocab_size": "x"}, {"hidden_size": 64.5}, {"num_attention_heads": 0},
                                    {"num_hidden_layers": None}, {"rope_parameters": 3}])  # fmt: skip
def test_values_of_another_kind_are_refused(fields):
    with pytest.raises(UserError, match="expected a whole number above 0|a field holds what"):
        config_from_hf({**preset("falcon-7b"), **fields})


def test_unknown_rope_scaling_is_refused():
    with pytest.raises(UserError, match="rope_type 'dynamic'"):
        GPT(config_from_name("SmolLM2-135M", n_layer=1, rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
