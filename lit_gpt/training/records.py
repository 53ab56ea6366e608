"""Writes what a training run leaves besides weights: metrics.csv, hyperparameters.json, summary.json, loss.png.

While the run goes on, it shows a progress bar, or lines where there is no terminal.
"""

import csv
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_gpt.distributed.fabric import Fabric
from lit_gpt.distributed.launch import all_reduce
from lit_gpt.files import atomic, write_json
from lit_gpt.hardware import peak_memory_bytes
from lit_gpt.reporting.charts import smooth
from lit_gpt.reporting.runs import COLUMNS
from lit_gpt.training import loggers


class Records:
    """Keeps the records of one run. Only rank 0 writes and shows; all ranks take part in sums over ranks.

    Args:
        logger: the name of a logger besides metrics.csv, or csv.
        hyperparameters: what hyperparameters.json is to hold.
    """

    def __init__(self, fabric: Fabric, out_dir: Path, logger: str, hyperparameters: dict[str, Any]) -> None:
        self.fabric, self.main = fabric, fabric.global_rank == 0
        self.out_dir, self.path = out_dir, out_dir / "metrics.csv"
        self.logger_name, self.hyperparameters = logger, hyperparameters
        self.logger: loggers.RunLogger | None = None
        self.rows: list[dict[str, Any]] = []
        self.pending: list[tuple[int, Tensor]] = []  # losses still on the device
        self.grad_norm: Tensor | None = None  # of the last step, still on the device
        self.tokens = self.new_tokens = 0
        self.seconds = 0.0  # of training, without validation and saving
        self.paused = 0.0  # seconds since the last row that were not training
        self.last_row_at = 0.0
        self.bar = tqdm(disable=True)
        self.memory: dict[str, int] = {}  # bytes of a step beside the model, planned and measured
        self.probe_losses: list[float] = []  # at the start and at the end

    def start(self) -> None:
        """Begin the records: write what the run is made of, and the empty metrics."""
        if self.main:
            self.open_logger(0)
            write_json(self.out_dir / "hyperparameters.json", self.hyperparameters)
            self.write_rows()
        self.fabric.barrier()

    def open_logger(self, step: int) -> None:
        """Open the logger, if the run has one, after so many steps."""
        if self.logger_name != "csv":
            self.logger = loggers.RunLogger(self.logger_name, self.out_dir, step, self.hyperparameters)
            write_json(self.logger.path, self.logger.record())

    def resume(self, step: int, progress: dict[str, Any]) -> None:
        """Continue the records of a run that is resumed after `step`, without what it wrote beyond that."""
        self.tokens, self.seconds = progress["tokens"], progress["seconds"]
        self.probe_losses = progress.get("probed", [])
        with open(self.path, newline="", encoding="utf-8") as file:
            self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        if self.main:
            self.open_logger(step)
            write_json(self.out_dir / "hyperparameters.json", self.hyperparameters)
            self.write_rows()

    def measured(self, column: str) -> dict[int, float]:
        """Return what a column holds, by step, where it holds something."""
        return {int(row["step"]): float(row[column]) for row in self.rows if row.get(column, "") != ""}

    def progress(self) -> dict[str, Any]:
        """Return what `resume` needs."""
        return {"tokens": self.tokens, "seconds": self.seconds, "probed": self.probe_losses}

    def write_rows(self) -> None:
        """Write all rows to metrics.csv."""
        with atomic(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    @contextmanager
    def show_progress(self, step: int, steps: int) -> Iterator[None]:
        """Show progress while the block runs."""
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None if self.main else True)
        self.last_row_at, self.paused, status = time.perf_counter(), 0.0, "failed"
        try:
            yield
            status = "success"
        finally:
            self.bar.close()
            if self.logger:
                self.logger.close(status)

    @contextmanager
    def pause_timer(self) -> Iterator[None]:
        """Leave the time of the block out of that of training."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def record_step(self, step: int, loss: Tensor, grad_norm: Tensor | None, tokens: int) -> None:
        """Note a step. Loss and norm stay on the device: reading them would make the host wait."""
        self.pending.append((step, loss))
        self.grad_norm = grad_norm
        self.new_tokens += tokens
        self.bar.update()

    def losses(self) -> list[tuple[int, float]]:
        """Return (step, loss) of each step since the last `log`, summed over ranks. Waits for the device."""
        losses = all_reduce(self.fabric, torch.stack([loss for _, loss in self.pending])).tolist()
        return [(step, loss) for (step, _), loss in zip(self.pending, losses, strict=True)]

    def log(self, step: int, losses: list[tuple[int, float]], lr: float) -> dict[str, Any]:
        """Sum up the steps since the last call in a row of metrics.csv, to which a val_loss may be added."""
        now = time.perf_counter()
        elapsed, self.last_row_at = now - self.last_row_at - self.paused, now
        tokens = self.new_tokens
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + elapsed
        self.pending, self.new_tokens, self.paused = [], 0, 0.0
        norm = {} if self.grad_norm is None else {"grad_norm": self.grad_norm.item()}
        return {
            "step": step,
            "tokens": self.tokens,
            "loss": sum(loss for _, loss in losses) / len(losses),
            "lr": lr,
            **norm,
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
        shown = {k: f"{row[k]:.4g}" for k in ("loss", "lr", "tokens_per_second", "val_loss", "score") if k in row}
        if "loss" in row:
            self.bar.set_postfix({"loss": shown["loss"], "tokens/s": shown["tokens_per_second"]})
        if self.bar.disable or "val_loss" in row:
            tqdm.write(f"step {row['step']}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def record_probe(self, step: int, loss: float) -> None:
        """Note the loss on the probe."""
        self.probe_losses.append(loss)
        if self.logger:
            self.logger.log(step, {"probe_loss": loss})

    def finish(self, method: str, objective: str, trainable: int, quantization: str | None) -> None:
        """Write summary.json and loss.png, and print the figures.

        Args:
            quantization: the format of the base's weights; None: they are not quantized.
        """
        validations = [float(row["val_loss"]) for row in self.rows if row["val_loss"] != ""]
        summary: dict[str, Any] = {
            "method": method,
            "objective": objective,
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
        if scores := list(self.measured("score").values()):
            summary |= {"score_first": scores[0], "score_last": scores[-1]}
        if self.logger and self.logger.failed_at is not None:
            summary["logger_failed_at_step"] = self.logger.failed_at
        if self.probe_losses:
            first, last = self.probe_losses[0], self.probe_losses[-1]
            summary |= {"probe_loss_first": first, "probe_loss_last": last}
            before, after = (math.exp(loss) if loss < 700 else math.inf for loss in (first, last))
            path = self.hyperparameters["probe_path"]
            print(f"probe {path}: loss {first:.3f} -> {last:.3f}, perplexity {before:.2f} -> {after:.2f}")
        write_json(self.out_dir / "summary.json", summary)
        plot(self.rows, self.out_dir / "loss.png")
        print(
            f"trained {summary['steps']} steps, {self.tokens:,} tokens in {self.seconds:.0f} s "
            f"({summary['tokens_per_second']} tokens/s), peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB, "
            f"validation loss {validations[0]:.3f} -> {validations[-1]:.3f}"
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the learning curves, over tokens: each logged training loss, their running mean, and the validation loss."""
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
