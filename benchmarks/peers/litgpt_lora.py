"""Contestant: LitGPT's own LoRA finetuning, in the environment that it is installed in. Its `fit` runs unchanged; what
it is given is a loader whose batches wait until a step is asked for. A step's time includes the loop's own printing.

Kept at its defaults: micro-batches padded to their longest sample (one sample each unless told otherwise), and the
mean over a batch's micro-batches of their mean losses. Reported, though, is the mean over all supervised tokens, so
that the loss compares. Its weights are kept in bfloat16 (`bf16-true`), the faster and smaller of its two.
"""

import importlib.metadata
import json
import re
from pathlib import Path

from protocol import Worker, set_A

worker = Worker()

import lightning  # noqa: E402
import torch  # noqa: E402
from litgpt import lora  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.data.base import get_sft_collate_fn  # noqa: E402
from litgpt.finetune.lora import fit  # noqa: E402
from litgpt.utils import instantiate_torch_optimizer, load_checkpoint  # noqa: E402

FOREVER = 10**6
PRECISIONS = {"bf16": "bf16-true", "fp32": "32-true"}


class Loader:
    """What `fit` takes for a DataLoader."""

    def __init__(self, batches: list[list[dict]], size: int, losses: list[torch.Tensor]) -> None:
        self.batches, self.size, self.losses = batches, size, losses
        self.dataset = [encode(sample) for batch in batches for sample in batch]
        self.pad = get_sft_collate_fn()

    def collate(self, samples: list[dict]) -> dict:
        batch = self.pad(samples)
        return batch | {name: batch[name].to(worker.device) for name in ("input_ids", "labels")}

    def __len__(self) -> int:
        return FOREVER

    def __iter__(self):
        for step in worker.steps():
            samples = [encode(sample) for sample in self.batches[step]]
            micro_batches = [samples[i : i + self.size] for i in range(0, len(samples), self.size)]
            self.losses.clear()
            for part in micro_batches:
                yield self.collate(part)
            counts = [sum(int((s["labels"][1:] != -100).sum()) for s in part) for part in micro_batches]
            loss = sum(loss * count for loss, count in zip(self.losses, counts, strict=True)) / sum(counts)
            worker.result(loss, sum(len(s["input_ids"]) - 1 for s in samples))
        raise SystemExit


class Validation(Loader):
    """One sample, for the check with which `fit` begins."""

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        yield self.collate(self.dataset[:1])


def encode(sample: dict) -> dict:
    """A sample in the form of LitGPT's own data sets."""
    ids, supervised = torch.tensor(sample["ids"]), torch.tensor(sample["supervised"])
    labels = torch.where(supervised == 1, ids, -100)
    return {"input_ids": ids, "labels": labels, "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)}}


def load(fabric: lightning.Fabric, job: dict) -> torch.nn.Module:
    every, folder = job["lora_layers"] == "all", Path(job["litgpt_dir"])
    switches = {name: every for name in ("lora_key", "lora_projection", "lora_mlp")}
    sizes = {name: job[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    config = lora.Config.from_file(
        folder / "model_config.yaml", lora_query=True, lora_value=True, lora_head=False, **switches, **sizes
    )
    with fabric.init_module(empty_init=False):
        model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    load_checkpoint(fabric, model, folder / "lit_model.pth", strict=False)
    qkv = ["q", "k", "v"] if every else ["q", "v"]
    names = {"attn.qkv": qkv, "attn.proj": ["o"], "mlp.fc_1": ["gate"], "mlp.fc_2": ["up"], "mlp.proj": ["down"]}
    for name, parameter in model.named_parameters():
        found = re.search(r"h\.(\d+)\.(.+)\.lora_A$", name)
        if found:
            set_A(job, parameter, int(found[1]), names.get(found[2], [found[2].removeprefix("mlp.")]))
    return model


def main() -> None:
    job = worker.job
    batches = json.loads(Path(job["batches"]).read_text(encoding="utf-8"))
    fabric = lightning.Fabric(accelerator=job["device"], devices=1, precision=PRECISIONS[job["precision"]])
    fabric.seed_everything(job["seed"])
    model = load(fabric, job)
    rates = {"lr": job["learning_rate"], "weight_decay": job["weight_decay"]}
    adamw = instantiate_torch_optimizer({"class_path": "torch.optim.AdamW", "init_args": rates}, model.parameters())
    optimizer = fabric.setup_optimizers(adamw)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0)
    losses: list[torch.Tensor] = []
    size, backward = job["litgpt_micro_batch"], fabric.backward

    def noted(loss: torch.Tensor, *args, **kwargs) -> None:
        losses.append(loss.detach() * (job["batch_size"] // size))  # `fit` divides by the micro-batches of a batch
        backward(loss, *args, **kwargs)

    fabric.backward = noted
    worker.loaded(model, litgpt=importlib.metadata.version("litgpt"))
    fit(
        fabric=fabric,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=Loader(batches, size, losses),
        val_dataloader=Validation(batches[:1], size, losses),
        devices=1,
        checkpoint_dir=Path(job["litgpt_dir"]),
        out_dir=Path(job["out_dir"]),
        train=TrainArgs(save_interval=None, global_batch_size=job["batch_size"], micro_batch_size=size, epochs=FOREVER),
        eval=EvalArgs(interval=FOREVER, max_new_tokens=1, max_iters=1, initial_validation=False),
        data=None,
    )


main()
