"""A checkpoint with a tower that reads images: its language model is converted and changed, the rest comes back as it
was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Llama4Config,
    Mistral3Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
)

from helpers.compare import TOLERANCE, off
from helpers.tiny_models import tiny_hf_model
from lit_gpt import Config
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.checkpoints.folder import load_state
from lit_gpt.conversion import hf, hf_shards, readers, towers
from lit_gpt.families import gemma, gemma4, llama, llama4, qwen3_5, qwen3_5_moe

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)  # fmt: skip
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=64,
                   num_position_embeddings=16)  # fmt: skip
GEMMA_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=16)  # fmt: skip
LLAMA_VISION = VISION | dict(projector_input_dim=16, projector_output_dim=16, vision_output_dim=16)
WRAPPED = {
    "gemma3": lambda: Gemma3Config(
        text_config=gemma.tiny_hf()["gemma3"], vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=95,
    ),
    "gemma4": lambda: Gemma4Config(
        text_config=gemma4.tiny_hf(pad_token_id=0)["small"].to_dict(), vision_config=GEMMA_VISION, audio_config=None,
        image_token_id=95, video_token_id=94, audio_token_id=93,
    ),
    "llama4": lambda: Llama4Config(
        text_config=llama4.tiny_hf()["llama4"].to_dict(), vision_config=LLAMA_VISION, image_token_index=95
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=llama.tiny_hf()["mistral"], vision_config=VISION | {"model_type": "pixtral"}, image_token_index=95
    ),
    "qwen3_5": lambda: Qwen3_5Config(
        text_config=qwen3_5.tiny_hf()["qwen3_5"].to_dict(), image_token_id=95,
        vision_config=QWEN_VISION,
    ),
    "qwen3_5_moe": lambda: Qwen3_5MoeConfig(
        text_config=qwen3_5_moe.tiny_hf()["qwen3_5_moe"].to_dict(), image_token_id=95, vision_config=QWEN_VISION
    ),
}  # fmt: skip


@torch.no_grad()
def scrambled(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.15)
    return model


@pytest.mark.parametrize("kind", WRAPPED)
@torch.no_grad()
def test_the_language_model_goes_in_and_out(kind, tmp_path):
    theirs, idx = scrambled(WRAPPED[kind]()), torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    assert off(load_model(tmp_path)(idx), theirs(input_ids=idx).logits) < TOLERANCE
    model = readers.hf_model(tmp_path, load_state(tmp_path), Config.from_checkpoint(tmp_path))
    assert off(model(idx).logits, theirs(input_ids=idx).logits) < TOLERANCE

    state = dict(load_state(tmp_path))
    state["h.1.attn.proj.weight"] = state["h.1.attn.proj.weight"] + 0.1
    torch.save(state, tmp_path / "changed.pth")  # the other is mapped
    (tmp_path / "changed.pth").replace(tmp_path / "lit_model.pth")
    hf.export(tmp_path, tmp_path / "hf", state)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "hf"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert (
        before.keys() == after.keys() and len(changed) == 1 and changed[0].endswith("layers.1.self_attn.o_proj.weight")
    )
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert off(again(input_ids=idx).logits, load_model(tmp_path)(idx)) < TOLERANCE
    assert off(again(input_ids=idx).logits, theirs(input_ids=idx).logits) > 1e-3
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == kind
    assert not (tmp_path / "hf" / towers.FILE).exists()
    (tmp_path / "merged").mkdir()
    hf.copy_side_files(tmp_path, tmp_path / "merged")
    assert (tmp_path / "merged" / towers.FILE).exists()


@torch.no_grad()
def test_both_spellings_of_the_names(tmp_path):
    """Published files have the language model as a whole; others its head beside."""
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
    for spelling in towers.SPELLINGS:
        stored = [next(old + n.removeprefix(new) for new, old in spelling.items() if n.startswith(new)) for n in names]
        found = towers.spelling_of([*stored, "vision_tower.weight", "multi_modal_projector.weight"])
        assert [towers.names_alone(name, found) for name in stored] == [[name] for name in names]
        assert not towers.names_alone("vision_tower.weight", found)
    assert towers.spelling_of(names) == {}


def test_a_gemma_alone_is_not_taken_for_more(tmp_path):
    tiny_hf_model("gemma", "gemma3").save_pretrained(tmp_path)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    assert not (tmp_path / towers.FILE).exists()


@torch.no_grad()
def test_a_language_model_beside_towers_that_need_further_packages(tmp_path):
    """Gemma 3n, whose tower that reads images is timm's: the names are those of its published files."""
    alone, idx = tiny_hf_model("gemma3n", "gemma3n"), torch.randint(90, (2, 40))
    stored = {name.replace("model.", "model.language_model.", 1): x.clone() for name, x in alone.state_dict().items()}
    del stored["lm_head.weight"]  # tied
    stored["model.vision_tower.timm_model.weight"] = torch.randn(3, 4)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = {"model_type": "gemma3n", "text_config": alone.config.to_dict(), "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    assert off(load_model(tmp_path)(idx), alone(idx).logits) < TOLERANCE
    hf.export(tmp_path, tmp_path / "hf", load_state(tmp_path))
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == stored.keys() and all(torch.equal(x, stored[name]) for name, x in after.items())
