"""What a training run leaves besides weights: metrics.csv, hyperparameters.json, summary.json, loss.png; and what it
shows while it goes: a progress bar, or lines where there is no terminal."""

import csv
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from lit_gpt.errors import UserError
from lit_gpt.files import atomic
from lit_gpt.hardware import peak_memory_bytes
from lit_gpt.reporting.charts import smooth
from lit_gpt.reporting.metrics import COLUMNS
from lit_gpt.training import loggers


class Records:
    """The records of one run. Only rank 0 writes and shows; all ranks take part in sums over ranks."""

    def __init__(self, hp: SimpleNamespace, fabric: Fabric) -> None:
        self.hp, self.fabric, self.main = hp, fabric, fabric.global_rank == 0
        self.path = hp.out_dir / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self.pending: list[tuple[int, Tensor]] = []  # losses still on the device
        self.tokens = self.new_tokens = 0
        self.seconds = 0.0  # of training, without validation and saving
        self.set_aside = 0.0
        self.bar = tqdm(disable=True)
        self.memory: dict[str, int] = {}  # of a step beside the model, planned and measured
        self.probed: list[float] = []  # losses on the probe, at the start and at the end
        self.logger: loggers.RunLogger | None = None  # besides metrics.csv

    def check_unused(self) -> None:
        """Refuse an out_dir that holds a run which is not to be resumed, and a logger that is not installed."""
        loggers.check_installed(self.hp)
        if self.path.exists() and self.hp.resume == "no":
            raise UserError(
                f"--out_dir {self.hp.out_dir}: already holds a run; --resume auto continues it, or choose another"
            )

    def start(self) -> None:
        """Begin: write what the run is made of, and the empty metrics."""
        if self.main:
            self.open_logger(0)
            write_json(self.hp.out_dir / "hyperparameters.json", self.hyperparameters())
            self.write_rows()
        self.fabric.barrier()

    def hyperparameters(self) -> dict[str, Any]:
        return {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.hp).items()}

    def open_logger(self, step: int) -> None:
        if self.hp.logger != "csv":
            self.logger = loggers.RunLogger(self.hp, step, self.hyperparameters())
            write_json(self.logger.path, self.logger.record())

    def go_on(self, step: int, progress: dict[str, Any]) -> None:
        """Continue the records of a run that is resumed after `step`; what it wrote beyond that is dropped."""
        self.tokens, self.seconds = progress["tokens"], progress["seconds"]
        self.probed = progress.get("probed", [])
        with open(self.path, newline="", encoding="utf-8") as file:
            self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        if self.main:
            self.open_logger(step)
            self.write_rows()

    def progress(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds, "probed": self.probed}

    def write_rows(self) -> None:
        with atomic(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    @contextmanager
    def watch(self, step: int, steps: int) -> Iterator[None]:
        """Show progress while the block runs."""
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None if self.main else True)
        self.last, self.set_aside, status = time.perf_counter(), 0.0, "failed"
        try:
            yield
            status = "success"
        finally:
            self.bar.close()
            if self.logger:
                self.logger.close(status)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not training."""
        start = time.perf_counter()
        yield
        self.set_aside += time.perf_counter() - start

    def count(self, step: int, loss: Tensor, tokens: int) -> None:
        """Note a step. The loss stays on the device: reading it would make the host wait."""
        self.pending.append((step, loss))
        self.new_tokens += tokens
        self.bar.update()

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of each step since the last `log`, summed over ranks. Waits for the device."""
        losses = self.fabric.all_reduce(torch.stack([loss for _, loss in self.pending]), reduce_op="sum").tolist()
        return [(step, loss) for (step, _), loss in zip(self.pending, losses, strict=True)]

    def log(self, step: int, losses: list[tuple[int, float]], lr: float) -> dict[str, Any]:
        """Close the account of the steps since the last call; returns its row, to which a val_loss may be added."""
        now = time.perf_counter()
        elapsed, self.last = now - self.last - self.set_aside, now
        tokens = self.new_tokens
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + elapsed
        self.pending, self.new_tokens, self.set_aside = [], 0, 0.0
        return {
            "step": step,
            "tokens": self.tokens,
            "loss": sum(loss for _, loss in losses) / len(losses),
            "lr": lr,
            "tokens_per_second": round(tokens / elapsed, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.csv and show it."""
        if not self.main:
            return
        self.rows.append({name: row.get(name, "") for name in COLUMNS})
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(self.rows[-1])
        if self.logger:
            self.logger.log(row["step"], {name: float(row[name]) for name in COLUMNS[1:] if name in row})
        shown = {k: f"{row[k]:.4g}" for k in ("loss", "lr", "tokens_per_second", "val_loss") if k in row}
        if "loss" in row:
            self.bar.set_postfix({"loss": shown["loss"], "tokens/s": shown["tokens_per_second"]})
        if self.bar.disable or "val_loss" in row:
            tqdm.write(f"step {row['step']}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def probe(self, step: int, loss: float) -> None:
        """Note the loss on the probe."""
        self.probed.append(loss)
        if self.logger:
            self.logger.log(step, {"probe_loss": loss})

    def finish(self, method: str, trainable: int, quantization: str | None) -> None:
        """Write summary.json and loss.png; `quantization`: of the base."""
        validations = [float(row["val_loss"]) for row in self.rows if row["val_loss"] != ""]
        summary = {
            "method": method,
            "base_quantization": quantization,
            "trainable_parameters": trainable,
            "steps": int(self.rows[-1]["step"]),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "peak_memory_bytes": max(int(row["peak_memory_bytes"]) for row in self.rows if row["peak_memory_bytes"]),
            **self.memory,
            "val_loss_first": validations[0],
            "val_loss_last": validations[-1],
        }
        if self.logger and self.logger.failed_at is not None:
            summary["logger_failed_at_step"] = self.logger.failed_at
        if self.probed:
            first, last = self.probed[0], self.probed[-1]
            summary |= {"probe_loss_first": first, "probe_loss_last": last}
            before, after = (math.exp(loss) if loss < 700 else math.inf for loss in (first, last))
            print(f"probe {self.hp.probe_path}: loss {first:.3f} -> {last:.3f}, perplexity {before:.2f} -> {after:.2f}")
        write_json(self.hp.out_dir / "summary.json", summary)
        plot(self.rows, self.hp.out_dir / "loss.png")
        print(
            f"trained {summary['steps']} steps, {self.tokens:,} tokens in {self.seconds:.0f} s "
            f"({summary['tokens_per_second']} tokens/s), peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB, "
            f"validation loss {validations[0]:.3f} -> {validations[-1]:.3f}"
        )


def write_json(path: Path, contents: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The learning curves, over tokens: each logged training loss, their running mean, and the validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    losses, validations = (
        [(int(row["tokens"] or 0), float(row[column])) for row in rows if row[column] != ""]
        for column in ("loss", "val_loss")
    )
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(*zip(*smooth(losses), strict=True), color="tab:blue", linewidth=2, label="training")
    axes.plot(*zip(*validations, strict=True), color="tab:red", linewidth=1.5, marker="o", label="validation")
    axes.set(xlabel="tokens", ylabel="loss (nats per supervised token)", title=path.parent.name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
