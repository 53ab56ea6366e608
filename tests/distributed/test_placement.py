"""Layers on several devices: answers are those of one, and no operation meets tensors of two."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from helpers.methods import METHODS, PROMPTS, make, with_adapter_v2, with_lora_and_adapter
from helpers.tiny_models import LAYOUTS
from lit_gpt.checkpoints.base_model import load_model, skeleton
from lit_gpt.distributed import placement
from lit_gpt.distributed.placement import PlacedExecution, Placement
from lit_gpt.families.registry import config_from_hf, families
from lit_gpt.generation.engine import Batch, decode, next_logits
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps import FastStep
from lit_gpt.kernels.policy import use_policy
from lit_gpt.model.gpt import GPT

ASKED = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14], [15, 16, 17, 18]]
TWO_CPUS = Placement((torch.device("cpu", 0), torch.device("cpu", 1)))


@pytest.fixture
def two_devices(monkeypatch):
    """Let the CPU be two devices."""
    monkeypatch.setattr(placement, "count", lambda device: 2)


def answers(model, step=None) -> list[list[int]]:
    """Return the tokens that greedily follow the prompts, continued three at a time."""
    rows = [DecodingRow(list(ids), 6, sampling=Sampling(temperature=0)) for ids in ASKED]
    for _ in decode(model, rows, model.kv_cache(3, 16), step=step):
        pass
    return [row.ids for row in rows]


def test_tokens_are_those_of_one_device(llama):
    model = load_model(llama, device=TWO_CPUS)
    runs = [block.execution for block in model.h]
    assert not isinstance(runs[0], PlacedExecution) and isinstance(runs[-1], PlacedExecution)
    assert answers(model, FastStep(model)) == answers(load_model(llama))


def test_scripts_answer_as_from_one_device(cli, llama, flags, tmp_path, two_devices):
    """The base, LoRA attached and merged, several LoRAs in a batch, quantized, and chat."""
    assert cli("finetune/lora.py", **flags | {"max_steps": 3}).code == 0
    trained, prompts = flags["out_dir"] / "lit_model_lora_finetuned.pth", tmp_path / "prompts.jsonl"
    lines = [{"instruction": "cat", "lora_path": str(trained)}, {"instruction": "dog"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"checkpoint_dir": llama, "precision": "fp32", "temperature": 0, "max_new_tokens": 8}
    ways = [
        ("generate/base.py", {"prompt": "cat"}),
        ("generate/base.py", {"prompt": "cat", "quantize": "int8"}),
        ("generate/base.py", {"prompt_file": prompts, "out": "FILE"}),
        ("generate/lora.py", {"prompt": "cat", "finetuned_path": trained}),
        ("generate/lora.py", {"prompt": "cat", "finetuned_path": trained, "merge": "false"}),
    ]
    for number, (script, given) in enumerate(ways):
        said = []
        for devices in (1, 2):
            out = tmp_path / f"{number}-{devices}.jsonl"
            more = {"out": out} if "out" in given else {}
            result = cli(script, **own | given | more | {"devices": devices})
            assert result.code == 0, result
            said.append([json.loads(line)["answer"] for line in out.open()] if more else result.out)
        assert said[0] == said[1] and said[0], (script, given)


def test_what_is_not_there_is_refused(cli, llama, monkeypatch):
    own = {"checkpoint_dir": llama, "prompt": "x", "device": "cpu"}
    cli("generate/base.py", **own | {"devices": 2}).refused("--devices 2", "finds 1", "cpu", code=2)
    cli("generate/base.py", **own | {"devices": 2, "compile": "true"}).refused("--compile true", "--devices 2", code=2)
    monkeypatch.setattr(placement, "count", lambda device: 99)
    cli("generate/base.py", **own | {"devices": 9}).refused("--devices 9", "layers", code=2)


class ToyMode(FakeTensorMode):
    """Makes fake tensors on devices that cannot be initialized."""

    avoid_device_init = True


@pytest.fixture(scope="module")
def toy() -> None:
    """Make a kind of device that has no kernels, on several of which fake tensors may lie."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.float32]
    backend_registration._setup_privateuseone_for_python_backend("toy", module)


@contextmanager
def on_two_toys(family: str, layout: str) -> Iterator[GPT]:
    """Yield a tiny model without contents on two devices, under the mode in which it can be used."""
    module = next(f for f in families() if f.__name__.endswith("." + family))
    config = config_from_hf(module.tiny_hf()[layout].to_dict())
    if config.kv_layers:
        pytest.skip("layers that share keys and values are refused")
    where = Placement((torch.device("toy", 0), torch.device("toy", 1)))
    model = skeleton(config, torch.float32, None).eval()
    parts = {name: (part.shape, where.device_of(name, config)) for name, part in model.state_dict().items()}
    with ToyMode() as mode, torch.no_grad(), use_policy(contents=False, cpp=False, triton=False):
        model.load_state_dict({name: torch.empty(shape, device=at) for name, (shape, at) in parts.items()}, assign=True)
        for rope in (model.rope, model.local_rope):
            rope.frequencies = mode.from_tensor(rope.frequencies)
        model.tie_weights()
        where.apply(model)
        yield model


def read_and_decode(model: GPT) -> None:
    """Read prompts packed and alone, and take steps of several rows and of one."""
    batch, virtual = Batch(model, model.kv_cache(2, 16)), list(model.virtual_tokens)
    rows = [DecodingRow([*virtual, 1, 2, 3], 4), DecodingRow([*virtual, 4, 5], 4)]
    for row in rows:
        batch.join(row)
    for active in (rows, rows, rows[:1]):
        logits = next_logits(model, active, batch.cache, None, lambda rows: None)
        assert logits.device == torch.device("toy", 0)
        for row in active:
            row.ids.append(6)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_no_operation_meets_tensors_of_two_devices(toy, family, layout):
    """On fake tensors, which tell devices apart."""
    with on_two_toys(family, layout) as model:
        read_and_decode(model)


@pytest.mark.parametrize("name", [*METHODS, *PROMPTS])
def test_what_a_method_adds_lies_where_its_layer_does(toy, name):
    with on_two_toys("llama", "llama3") as model:
        make(name).attach(model)
        read_and_decode(model.eval())


@pytest.mark.parametrize("attach", [with_lora_and_adapter, with_adapter_v2])
def test_what_adapters_add_lies_where_its_layer_does(toy, attach):
    with on_two_toys("llama", "llama3") as model:
        read_and_decode(attach(model).eval())
