"""Contestants: PEFT over transformers in a plain loop, as its documentation sets it up (`peft`) and as fast as we could
make it (`peft_tuned`). The loss is Trainer's: the mean over the supervised tokens of the whole batch.

`peft`: bfloat16 model, PEFT's float32 adapters, micro-batches padded to their longest sample, with attention mask.
`peft_tuned`: bfloat16 adapters; samples packed into rows without padding, positions restarting; the head computed at
supervised positions alone; where the model takes attention from outside, our own that keeps to sample boundaries is
lent to it, elsewhere it gets a block-diagonal mask.
"""

import json
import re
from pathlib import Path

from protocol import DTYPES, Worker, set_A

worker = Worker()

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

NAMES = {"self_attn.o": "o", "dense": "o", "dense_h_to_4h": "fc", "dense_4h_to_h": "down", "query_key_value": "qkv"}
Sample = tuple[Tensor, Tensor]  # token ids, and 1 where they are supervised


def load(job: dict, tuned: bool) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(job["checkpoint_dir"], dtype=DTYPES[job["precision"]])
    model = model.to(worker.device)
    every = job["lora_layers"] == "all"
    fused = any(name.endswith("query_key_value") for name, _ in model.named_modules())
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=job["lora_r"],
        lora_alpha=job["lora_alpha"],
        lora_dropout=job["lora_dropout"],
        target_modules="all-linear" if every else ["query_key_value"] if fused else ["q_proj", "v_proj"],
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=not tuned)
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            layer, last = re.search(r"\.(\d+)\.", name)[1], name.rpartition(".")[2].removesuffix("_proj")
            set_A(job, module.lora_A["default"].weight, int(layer), [NAMES.get(last, last)])
    return model.train()


class Padded:
    """Micro-batches of `size` samples, padded on the right."""

    def __init__(self, model: peft.PeftModel, size: int) -> None:
        self.model, self.size = model, size

    def summed_loss(self, samples: list[Sample]) -> tuple[Tensor, int]:
        shape = len(samples), max(len(ids) for ids, _ in samples)
        ids, mask = torch.zeros(2, *shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for row, (tokens, supervised) in enumerate(samples):
            n = len(tokens)
            ids[row, :n], mask[row, :n] = tokens, 1
            labels[row, :n] = torch.where(supervised == 1, tokens, -100)
        device, count = worker.device, (labels[:, 1:] != -100).sum()
        loss = self.model(ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        return loss * count.to(device), int(mask.sum()) - len(samples)


class Packed:
    """Rows of `size` samples one after another. The last token of each predicts nothing and is not fed."""

    def __init__(self, model: peft.PeftModel, size: int, compile: bool) -> None:
        self.model, self.size, self.segments = model.get_base_model(), size, None
        # compiled, ours would be compiled anew for each set of lengths
        self.lent = self.model._supports_attention_backend and not compile
        if compile:
            self.model.base_model.compile(dynamic=True)
        if self.lent:
            from lit_gpt.kernels.attention import ScoreParams
            from lit_gpt.model.sdpa import attend_packed

            def attention(module, q, k, v, mask, scaling, **_):
                scores = ScoreParams(scaling, getattr(module, "sliding_window", None))
                y = attend_packed(q, k, v, scores, self.segments)
                return y.transpose(1, 2).contiguous(), None

            transformers.AttentionInterface.register("packed", attention)
            self.model.set_attn_implementation("packed")

    def summed_loss(self, samples: list[Sample]) -> tuple[Tensor, int]:
        from lit_gpt.data import dataset, packing

        row = packing.pack(dataset.Sample(ids, supervised) for ids, supervised in samples).to(worker.device)
        self.segments = row.segments
        more = {"position_ids": row.segments.positions[None]} if len(samples) > 1 else {}
        if more and not self.lent:
            more["attention_mask"] = within_samples(row.segments.lengths)
        hidden = self.model.base_model(row.idx, use_cache=False, **more).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[0, row.targets.positions])
        return F.cross_entropy(logits.float(), row.targets.labels, reduction="sum"), row.idx.numel()


def within_samples(lengths: tuple[int, ...]) -> Tensor:
    """A causal mask that keeps to samples, bool (1, 1, T, T). transformers makes its own from positions that restart,
    but not for every model: its Falcon lets samples see those before them."""
    blocks = [torch.ones(n, n, dtype=torch.bool, device=worker.device).tril() for n in lengths]
    return torch.block_diag(*blocks)[None, None]


def main() -> None:
    job = worker.job
    tuned = job["contestant"] == "peft_tuned"
    batches = json.loads(Path(job["batches"]).read_text(encoding="utf-8"))
    model = load(job, tuned)
    worker.loaded(model, transformers=transformers.__version__, peft=peft.__version__)
    way = Packed(model, job["tuned_row"], job["tuned_compile"]) if tuned else Padded(model, job["micro_batch"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    rates = {"lr": job["learning_rate"], "weight_decay": job["weight_decay"]}
    optimizer = torch.optim.AdamW(parameters, **rates, fused=True)
    torch.manual_seed(job["seed"])
    for step in worker.steps():
        samples = [(torch.tensor(s["ids"]), torch.tensor(s["supervised"])) for s in batches[step]]
        count = sum(int(supervised[1:].sum()) for _, supervised in samples)
        total, tokens = 0.0, 0
        for i in range(0, len(samples), way.size):
            loss, fed = way.summed_loss(samples[i : i + way.size])
            (loss / count).backward()
            total, tokens = total + loss.detach() / count, tokens + fed
        optimizer.step()
        optimizer.zero_grad()
        worker.result(total, tokens)


main()
