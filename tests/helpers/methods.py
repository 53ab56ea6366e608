"""Attach finetuning methods to models as if they had been trained."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.methods import adapter, adapter_v2, finetuned_file, lora
from lit_gpt.methods.hyperparameters import SWITCHES, AdapterConfig, PartsConfig
from lit_gpt.methods.method import Method
from lit_gpt.methods.registry import config_class, make_method

EVERYTHING = lora.LoRAConfig(
    r=4, alpha=8, dropout=0.0, query=True, key=True, value=True, projection=True, mlp=True, head=True
)
ONE_EACH = [replace(EVERYTHING, **{name: name == only for name in SWITCHES}) for only in SWITCHES]
STYLE = {"name": "plain", "template": "", "own_bos": False, "stop_ids": []}
LORAS = [  # of different ranks, scales and projections
    lora.LoRAConfig(r=2, alpha=4),
    lora.LoRAConfig(r=4, alpha=4, query=False, key=True, projection=True),
    lora.LoRAConfig(r=3, alpha=12, mlp=True, head=True),
    lora.LoRAConfig(r=5, query=False, value=False, head=True),
]

# The methods that are values of LoRA's flags, by the names that they go by.
LORA_METHODS = {
    "LoRA": {},
    "rsLoRA": {"scaling": "sqrt_r"},
    "LoRA+": {"lr_ratio": 16},
    "LoRA-FA": {"train": "B"},
    "DoRA": {"update": "dora"},
    "VeRA": {"update": "vera"},
    "Tied-LoRA": {"update": "tied"},
    "MultiLoRA": {"update": "multi"},
    "QA-LoRA": {"update": "qa"},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
}
OTHERS = {  # by name: the registered method, and its settings
    "IA3": ("ia3", {}),
    "Houlsby": ("bottleneck", {"size": 8, "activation": "gelu"}),
    "Pfeiffer": ("bottleneck", {"size": 8, "place": "mlp", "norm": True}),
    "parallel": ("bottleneck", {"size": 8, "place": "parallel", "scale": 2.0, "activation": "silu"}),
    "BitFit and norms": ("bitfit", {"parts": PartsConfig(norms=True)}),
}
BESIDES = {  # what cannot become a product of two matrices
    "GLoRA": {"update": "glora"},
    "LoRA and norms": {"parts": PartsConfig(norms=True)},
    "LoRA and embeddings": {"parts": PartsConfig(embeddings="both"), "head": False},
}
METHODS = LORA_METHODS | {"DoRA from PiSSA": {"update": "dora", "init": "pissa"}} | BESIDES | OTHERS
PROMPTS = {
    "prompt tuning": {},
    "P-tuning": {"encoder": "mlp", "hidden": 12},
    "P-tuning by LSTM": {"encoder": "lstm", "hidden": 12},
    "prefix tuning": {"kind": "keys_values"},
    "encoded prefix tuning": {"kind": "keys_values", "encoder": "mlp", "hidden": 12},
}


def make(name: str, **settings) -> Method:
    """Return a method of METHODS or PROMPTS, adapting all that it can."""
    if name in PROMPTS:
        return make_method("prompt", config_class("prompt")(**{"length": 5} | PROMPTS[name] | settings))
    if name in OTHERS:
        kind, own = OTHERS[name]
        return make_method(kind, config_class(kind)(**own | settings))
    return make_method("lora", replace(EVERYTHING, **METHODS[name] | settings))


def attach_fresh(model: GPT, name: str, **settings) -> GPT:
    """Attach a method of METHODS to all that it can adapt, as at the beginning of a run."""
    made = make(name, **settings)
    if getattr(made.config, "update", None) in ("dora", "glora") and model.config.n_expert:
        made = make(name, **settings | {"mlp": False})
    made.attach(model)
    made.initialize(model)
    return model


def lora_files(
    folder: Path, configs: list[lora.LoRAConfig], quantize: str | None = None, style: dict = STYLE
) -> list[Path]:
    """Write LoRA files as if trained on the checkpoint in `folder`, one for each configuration."""
    base, paths = BaseCheckpoint.open(folder, quantize), []
    for i, config in enumerate(configs):
        torch.manual_seed(i)
        state = finetuned_file.trained_state(lora.attach(base.build(), config))
        state = {name: 0.3 * torch.randn_like(tensor) for name, tensor in state.items()}
        paths.append(folder / f"{i}.pth")
        record = {"hyperparameters": asdict(config), "prompt_style": style, "quantize": quantize}
        finetuned_file.save_file(paths[-1], lora.NAME, base.fingerprint, state, **record)
    return paths


def with_lora_and_adapter(model: GPT) -> GPT:
    """Attach LoRA and an adapter: one layer has a prompt, the other none."""
    return adapter.attach(lora.attach(model, lora.LoRAConfig(r=4)), adapter.AdapterConfig(start_layer=1))


def with_adapter_v2(model: GPT) -> GPT:
    """Attach an adapter v2 to every layer."""
    return adapter_v2.attach(model, AdapterConfig(start_layer=0))


def as_if_trained(model: GPT) -> GPT:
    """Move all trainable parameters a little, so that methods that start at zero have an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
