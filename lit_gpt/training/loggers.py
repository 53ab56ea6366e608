"""Sends metrics to TensorBoard, Weights & Biases or MLflow, besides metrics.csv, through Lightning's loggers.

`out_dir/logger.json` names the run there, so that a resumed run goes on in the same one.
"""

import os
import sys
import uuid
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_gpt.distributed.fabric import TensorBoardLogger
from lit_gpt.errors import UserError
from lit_gpt.files import read_json

FILE = "logger.json"


def _tensorboard(out_dir: Path, run: str | None, step: int) -> tuple[Any, str]:
    # what was written beyond `step` before a crash is hidden
    logger = TensorBoardLogger(out_dir, "tensorboard", "", default_hp_metric=False, purge_step=step + 1)
    logger.experiment.flush()  # opens the file
    return logger, "tensorboard"


def _wandb(out_dir: Path, run: str | None, step: int) -> tuple[Any, str]:
    from lightning.pytorch.loggers import WandbLogger

    run = run or uuid.uuid4().hex[:8]
    project = os.environ.get("WANDB_PROJECT", "lit-gpt")
    logger = WandbLogger(name=str(out_dir), save_dir=out_dir, id=run, project=project)
    _ = logger.experiment  # opens the run
    return logger, run


def _mlflow(out_dir: Path, run: str | None, step: int) -> tuple[Any, str]:
    from lightning.pytorch.loggers import MLFlowLogger

    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lit-gpt")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # where `mlflow ui` looks, too
    logger = MLFlowLogger(experiment, str(out_dir), uri, run_id=run)
    return logger, logger.run_id


OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


class RunLogger:
    """Sends a run's metrics to a logger. If that fails within the run, it warns then and at the end; the run goes on.

    Args:
        step: how many steps are done already; 0 for a run that begins.
        hyperparameters: sent where the run begins.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, name: str, out_dir: Path, step: int, hyperparameters: dict[str, Any]) -> None:
        self.name, self.path = name, out_dir / FILE
        self.failed_at: int | None = None  # the first step that is missing there
        known = read_json(self.path, missing_ok=True)
        run = known.get("run") if known.get("logger") == name else None
        try:
            self.logger, self.run = OPENERS[name](out_dir, run, step)
            if run is None:
                self.logger.log_hyperparams(hyperparameters)
        except Exception as error:  # whatever a service or its client does
            raise UserError(f"--logger {name}: cannot be opened: {reason(error)}; --logger csv needs nothing") from None

    def record(self) -> dict[str, str]:
        """Return the contents of logger.json."""
        return {"logger": self.name, "run": self.run}

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of a step."""
        if self.failed_at is not None:
            return
        try:
            self.logger.log_metrics(values, step)
        except Exception as error:
            self.failed_at = step
            message = f"--logger {self.name} failed at step {step}: {reason(error)}"
            tqdm.write(f"warning: {message}; the run goes on, and metrics.csv holds all", file=sys.stderr)

    def close(self, status: str) -> None:
        """End the run in the logger, as "success" or "failed"."""
        try:
            self.logger.finalize(status)
            if self.name == "wandb":
                self.logger.experiment.finish(exit_code=int(status != "success"))
        except Exception as error:
            print(f"warning: --logger {self.name} could not be closed: {reason(error)}", file=sys.stderr)
        if self.failed_at is not None:
            print(f"warning: --logger {self.name} has nothing from step {self.failed_at} on", file=sys.stderr)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
