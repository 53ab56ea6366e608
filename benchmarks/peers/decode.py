"""A contestant of benchmarks/generate_speed.py: holds its model and answers the prompts, greedily, when it is asked to.

Which library and which variant is the job's "contestant". Needs torch and that library alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from protocol import DTYPES, Worker, forget_peak, held_bytes, peak_bytes

worker = Worker()

import torch  # noqa: E402

JOB = worker.job
NAME, PROMPTS, NEW = JOB["contestant"], JOB["prompts"], JOB["new_tokens"]
DTYPE = DTYPES[JOB["precision"]]
Turns = Iterator[tuple[float, list[int]]]  # when each turn's tokens were there, one of each prompt's answer
Answer = Callable[[], Turns]
about: dict[str, int] = {}


def ours() -> Answer:
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.generation.engine import decode
    from lit_gpt.generation.sampling import GREEDY
    from lit_gpt.generation.sequence import DecodingRow
    from lit_gpt.generation.steps import FastStep
    from lit_gpt.methods import adapter, adapter_v2, lora
    from lit_gpt.methods.hyperparameters import AdapterConfig

    options = NAME.split("_")[1:]
    torch.manual_seed(0)
    folder = next((JOB["quantized"][option] for option in options if option in JOB["quantized"]), JOB["checkpoint_dir"])
    model = BaseCheckpoint.open(Path(folder), resident=True).build(DTYPE, worker.device)  # as generate/base.py does
    if "lora" in options:
        lora.attach(model, lora.LoRAConfig(key=True, projection=True, mlp=True))
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.002)
    if "merged" in options:
        lora.merge(model)
    if "adapter" in options:
        adapter.attach(model, AdapterConfig())
    if "v2" in options:
        adapter_v2.attach(model, AdapterConfig())
    count_weights(model, model.wte)
    step = None if "eager" in options else FastStep(model.eval(), compile="compiled" in options)

    def answer() -> Turns:
        rows, turn = [DecodingRow(list(prompt), NEW, sampling=GREEDY) for prompt in PROMPTS], []
        cache = model.kv_cache(len(rows), len(PROMPTS[0]) + NEW)
        for _, token in decode(model, rows, cache, step=step):
            turn.append(token)
            if len(turn) == len(rows):
                yield time.perf_counter(), turn
                turn = []

    return answer


def count_weights(model: torch.nn.Module, embedding: torch.nn.Module) -> None:
    """What a token needs of the weights: all, but of an embedding that is not the head as well a single row."""
    modules = [module for module in model.modules() if module is not embedding]
    sizes = {p.data_ptr(): p.nbytes for module in modules for p in module.parameters(recurse=False)}
    about["weight_bytes"] = sum(sizes.values())


def transformers() -> Answer:
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Times(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            times.append((time.perf_counter(), value.flatten().tolist()))

        def end(self) -> None:
            pass

    times: list[tuple[float, list[int]]] = []
    model = AutoModelForCausalLM.from_pretrained(JOB["checkpoint_dir"], dtype=DTYPE).to(worker.device)
    model.generation_config.eos_token_id = None
    count_weights(model, model.get_input_embeddings())
    idx = torch.tensor(PROMPTS, device=worker.device)
    more = {"attention_mask": torch.ones_like(idx), "pad_token_id": 0}
    if NAME.endswith("static"):
        more["cache_implementation"] = "static"
        if worker.device.type == "cpu":  # on a GPU it compiles by itself
            model.forward = torch.compile(model.forward)

    def answer() -> Turns:
        times.clear()
        model.generate(idx, max_new_tokens=NEW, do_sample=False, streamer=Times(), **more)
        return iter(times[1:])  # the prompts come first

    return answer


def litgpt() -> Answer:
    from lightning.fabric import Fabric
    from litgpt import GPT, Config
    from litgpt.generate.base import generate_fn
    from litgpt.utils import load_checkpoint

    folder = Path(JOB["litgpt_dir"])
    fabric = Fabric(accelerator=worker.device.type, devices=1, precision="bf16-true")
    with fabric.init_module():
        model = GPT(Config.from_file(folder / "model_config.yaml"))
        model.max_seq_length = len(PROMPTS[0]) + NEW
        model.set_kv_cache(batch_size=1)
    model.eval()
    load_checkpoint(fabric, model, folder / "lit_model.pth")
    # its copy of the embedding is not tied to the head
    count_weights(model, model.transformer.wte)
    prompt, whole = torch.tensor(PROMPTS[0], device=worker.device), len(PROMPTS[0]) + NEW

    def answer() -> Turns:
        for block in model.transformer.h:
            block.attn.kv_cache.reset_parameters()
        found = generate_fn(
            model, prompt, whole, temperature=0.0, top_p=0.0, include_prompt=False, include_eos=True, stop_tokens=()
        )
        return ((time.perf_counter(), [int(token)]) for token in found)

    return answer


def memory() -> None:
    """Not a contestant: how fast this machine reads, by the sum of numbers that no cache holds; the best of several."""
    numbers = torch.ones(2**27 if worker.device.type == "cpu" else 2**30, device=worker.device)
    worker.send(ready=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            float(numbers.sum())
            seconds.append(time.perf_counter() - start)
        worker.send(bytes_per_second=numbers.nbytes / min(seconds))


@torch.inference_mode(NAME.startswith("litgpt"))
def main() -> None:
    if NAME == "memory":
        return memory()
    answer = {"ours": ours, "hf": transformers, "litgpt": litgpt}[NAME.split("_")[0]]()
    model_bytes = held_bytes(worker.device)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    worker.send(ready=True, model_bytes=model_bytes, **versions, **about)
    forget_peak(worker.device)
    for line in sys.stdin:
        json.loads(line)
        start = time.perf_counter()
        found = list(answer())
        (first, _), (last, _) = found[0], found[-1]
        worker.send(
            first_seconds=first - start,
            tokens_per_second=(len(found) - 1) * len(PROMPTS) / (last - first),
            ids=[token for _, turn in found for token in turn],
            peak_bytes=peak_bytes(worker.device),
        )


main()
