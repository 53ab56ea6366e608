"""Writes and reads resume states, the checkpoints of a run: `state/step_00000100.pth` in out_dir, a finetuned file with
what resuming needs. `loop.Trainer.restore` goes on from one.

A state is written whole or not at all. The newest `--keep_states` stay, and so does the best: that with the lowest
validation loss, or the highest score by `--metric`, among those saved when it was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints import io
from lit_gpt.distributed.fabric import Fabric
from lit_gpt.distributed.launch import on_main
from lit_gpt.errors import UserError
from lit_gpt.training.checks import locked_flags, refuse_changed, state_paths

FORMAT_VERSION = 2  # of the part of a state that resuming needs


@dataclass
class ResumeStates:
    """Keeps the resume states of one run.

    Attributes:
        keep: how many of the newest states stay.
        flags: the run's flags, of which those that bear on its weights are locked.
        identity: what the run trains on: base, its quantization, data, the method's settings. Only a run with the same
            may continue from a state.
        best: step of the best state, and by what it was compared: the lowest is best.
    """

    fabric: Fabric
    out_dir: Path
    keep: int
    flags: dict[str, Any]
    identity: dict[str, Any]
    best: tuple[int, float] | None = None

    def path(self, step: int) -> Path:
        return self.out_dir / "state" / f"step_{step:08d}.pth"

    def paths(self) -> list[Path]:
        return state_paths(self.out_dir)

    def write(self, step: int, judged: float | None, contents: dict[str, Any], resume: dict[str, Any]) -> None:
        """Write the state of `step`, and drop those that are neither among the newest nor the best.

        Args:
            judged: by what the step's validation is compared with others, if there was one; see Evaluator.
            contents: the contents of a finetuned file.
            resume: what resuming needs besides.
        """
        if judged is not None and (self.best is None or judged < self.best[1]):
            self.best = step, judged
        own = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "best": self.best,
            "hyperparameters": locked_flags(self.flags),
            "identity": self.identity,
        }

        def write() -> None:
            io.save(self.path(step), contents | {"resume": resume | own})
            older = [path for path in self.paths() if path <= self.path(step)]
            best = self.path(self.best[0]) if self.best else None
            for path in older[self.keep :]:
                if path != best:
                    path.unlink()

        on_main(self.fabric, write)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Read the newest whole state if there is one, checked to be of this run.

        Raises:
            UserError: it belongs to a run with other hyperparameters, base or data, or has another format; or there
                are states, none of them whole.
        """
        paths = self.fabric.broadcast(self.paths())
        for path in paths:
            try:
                contents = io.load(path, mmap=False)
            except UserError as error:
                self.fabric.print(f"{error}; trying the state before it")
                continue
            self.refuse_other_run(path, contents)
            best = contents["resume"]["best"]
            self.best = best and (best[0], best[1])
            return path, contents
        if paths:
            raise UserError(f"{self.out_dir / 'state'}: none of its states is readable; choose another --out_dir")
        return None

    def refuse_other_run(self, path: Path, contents: dict[str, Any]) -> None:
        """Refuse a state that another run has written, or an earlier release."""
        before = contents.get("resume", {})
        if before.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: not a resume state of format version {FORMAT_VERSION}, but of an earlier release; start anew "
                "in another --out_dir"
            )
        refuse_changed(before["hyperparameters"], self.flags, path)
        for name, value in self.identity.items():
            if before["identity"].get(name) != value:
                raise UserError(f"{path}: that run has another {name}; choose another --out_dir")

    def best_step_note(self, step: int, name: Callable[[float], str]) -> str:
        """Return a remark if an earlier state than that of `step` was the best; `name` says by what."""
        if self.best is None or self.best[0] == step:
            return ""
        return f"; {name(self.best[1])}, was that of {self.path(self.best[0])}"
