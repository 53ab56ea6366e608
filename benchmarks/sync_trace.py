"""Whether a training step makes the host wait for the device: a profiler's trace of some steps between two logs.

    python benchmarks/sync_trace.py --trace trace.json -- --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --data_dir data/alpaca --out_dir out/traced

Runs finetune/lora.py with the flags after --, counts what makes a host wait (synchronizing calls of CUDA, numbers read
out of tensors) in the steps that are traced, and exits with 1 if there is any. On a CPU only the latter is seen.
"""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from lit_gpt import cli
from lit_gpt.cli import NonNegativeInt, PositiveInt

trace: Path | None = None  # .json to write for a trace viewer (null: none)
warmup: NonNegativeInt = 3  # steps before those that are traced
steps: PositiveInt = 3  # steps traced

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "aten::nonzero")
SCRIPT = Path(__file__).parent.parent / "finetune" / "lora.py"


def main(hp: SimpleNamespace, argv: list[str]) -> None:
    from torch.profiler import ProfilerActivity, profile

    from lit_gpt import train
    from lit_gpt.errors import UserError

    optimize, prepare = train.Run.optimize, train.Run.prepare
    last, found = hp.warmup + hp.steps, {}
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if train.torch.cuda.is_available() else []
    profiler = profile(activities=activities)

    def optimize_traced(run: train.Run):
        if run.step == hp.warmup:
            profiler.start()
        result = optimize(run)
        if run.step == last - 1:
            profiler.stop()
            found.update({e.key: e.count for e in profiler.key_averages() if e.key in WAITS})
        return result

    def prepare_untraced(run: train.Run, step: int):
        """Which looks into the data set on the host."""
        on = hp.warmup <= run.step < last - 1
        profiler.toggle_collection_dynamic(False, activities) if on else None
        batch = prepare(run, step)
        profiler.toggle_collection_dynamic(True, activities) if on else None
        return batch

    train.Run.optimize, train.Run.prepare = optimize_traced, prepare_untraced
    script = runpy.run_path(str(SCRIPT))
    forever = ["--log_interval=1000000", "--eval_interval=1000000", "--save_interval=1000000", "--sample_tokens=0"]
    script["main"](cli.parse(script, [*forever, f"--max_steps={last + 1}", "--warmup_steps=0", *argv]))
    if hp.trace:
        profiler.export_chrome_trace(str(hp.trace))
    if found:
        raise UserError("the host waits: " + ", ".join(f"{name} {n} times" for name, n in found.items()))
    print(f"{hp.steps} steps: the host never waits")


if __name__ == "__main__":
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, rest = sys.argv[:at], sys.argv[at + 1 :]
    cli.run(lambda hp: main(hp, rest))
