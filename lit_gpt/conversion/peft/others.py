"""Write PEFT's adapters of IA3, and of learned prompts: prompt tuning, P-tuning and prefix tuning."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.conversion import weights
from lit_gpt.conversion.peft.layout import layers
from lit_gpt.conversion.peft.lora import CONFIG, PREFIX, TENSORS, shortest
from lit_gpt.errors import UserError
from lit_gpt.families.registry import family_of_config
from lit_gpt.methods.ia3 import ScaledInput, ScaledKeysValues, factor_layers
from lit_gpt.methods.prompt import VirtualEmbedding
from lit_gpt.model.gpt import GPT

Adapter = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and what the configuration says of them


@torch.no_grad()
def write(folder: Path, model: GPT, method: str, base_model: str, source: Path) -> None:
    """Write what `PeftModel.from_pretrained(base, folder)` loads.

    Args:
        method: the method that is attached to `model`.
        base_model: the base's path, or its name on the hub.
        source: the finetuned file, for errors.

    Raises:
        UserError: PEFT has no such method, or not for such layers.
    """
    if method not in WRITERS:
        known = ", ".join(("lora", *WRITERS))
        raise UserError(f"{source}: trained by the method {method}, which PEFT does not have; expected {known}")
    tensors, fields = WRITERS[method](model, source)
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    io.save_safetensors(folder / TENSORS, tensors, {"format": "pt"})
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(common | fields, indent=2) + "\n", encoding="utf-8")


def of_ia3(model: GPT, source: Path) -> Adapter:
    """Return the factors by the layers of transformers: (out_features, 1) of outputs, (1, in_features) of inputs."""
    attached, found, feedforward = factor_layers(model), dict[str, Tensor](), set[str]()
    for layer in layers(model.config):
        ours = attached.get(layer.lit)
        if isinstance(ours, ScaledKeysValues):
            if bool(((ours.start <= layer.rows) & (layer.rows < ours.stop)).any()):
                found[layer.name] = ours.all_factors()[layer.rows].unsqueeze(1)
        elif isinstance(ours, ScaledInput):
            found[layer.name] = ours.factors.unsqueeze(0)
            feedforward.add(layer.name)
        elif ours is not None:
            raise UserError(f"{source}: has factors of the experts in {layer.lit}, which PEFT cannot have")
    names = {name.rpartition(".")[0] for row in weights.rows(model.config) for name in row.hf} | set(found)
    fields = {
        "peft_type": "IA3",
        "target_modules": sorted({shortest(name, set(found), names) for name in found}),
        "feedforward_modules": sorted({shortest(name, feedforward, names) for name in feedforward}),
    }
    return {f"{PREFIX}{name}.ia3_l": tensor for name, tensor in found.items()}, fields


def of_prompt(model: GPT, source: Path) -> Adapter:
    """Return the vectors of virtual tokens as they come out of an encoder, which PEFT leaves out as well.

    PEFT puts embeddings behind the base's, where transformers does not multiply them any more.
    """
    embedding, config = model.get_submodule("wte"), model.config
    assert isinstance(embedding, VirtualEmbedding)
    vectors = embedding.prompt()
    fields = {
        "peft_type": "PROMPT_TUNING" if embedding.embeds else "PREFIX_TUNING",
        "num_virtual_tokens": len(vectors),
        "num_layers": config.n_layer,
        "num_transformer_submodules": 1,
    }
    if embedding.embeds:
        fields |= {"token_dim": config.n_embd, "num_attention_heads": config.n_head, "prompt_tuning_init": "RANDOM"}
        return {"prompt_embeddings": vectors * config.embedding_scale}, fields
    groups, size = config.n_query_groups, config.head_size
    if groups > 1 and getattr(family_of_config(config), "CACHES_EVERY_HEAD", False):
        heads = vectors.unflatten(1, (-1, groups, size)).repeat_interleave(config.n_head // groups, dim=2)
        vectors, groups = heads.flatten(1), config.n_head
    return {"prompt_embeddings": vectors}, fields | {"token_dim": groups * size, "num_attention_heads": groups}


WRITERS = {"ia3": of_ia3, "prompt": of_prompt}
