"""Takes a step on the longest row that changes nothing: what runs out of memory does so before the first step."""

import time
from collections.abc import Sequence

import torch

from lit_gpt import hardware
from lit_gpt.distributed.launch import all_reduce
from lit_gpt.training.batches import Batches
from lit_gpt.training.memory.activation_checkpointing import KINDS, apply_activation_checkpointing
from lit_gpt.training.memory.compiling import compile_blocks
from lit_gpt.training.memory.plan import MemoryPlanner, Plan
from lit_gpt.training.strategy import Worker


def configure_memory(
    worker: Worker, planner: MemoryPlanner, lengths: Sequence[int], weight: int, compiled: bool
) -> Plan:
    """Let the blocks keep as little of a run's longest row as memory demands, compile them if wanted; return the plan.

    Args:
        lengths: tokens of each sample in the row.
        weight: the row's, as the objective counts it.
    """
    fabric = worker.fabric
    kind, _, plan = planner.choose_settings([(list(lengths), weight)])
    if fabric.world_size > 1:  # ranks gather weights together, and so must run the same
        index = torch.tensor(KINDS.index(kind), device=fabric.device)
        kind = KINDS[int(all_reduce(fabric, index, "max"))]
    if not (compiled and kind == "selective"):  # what is compiled does so by itself
        apply_activation_checkpointing(worker.model, kind)
    if compiled:
        compile_blocks(worker.model)
    if kind not in (planner.args.memory.activation_checkpointing, "none"):
        fabric.print(f"memory: activation checkpointing is {kind}, by the plan")
    return plan


def probe_longest_row(worker: Worker, batches: Batches, planner: MemoryPlanner, compiled: bool) -> dict[str, int]:
    """Configure memory for the longest row of an epoch and take a step on it as a dry run.

    Returns:
        the bytes of the step beside the loaded model, planned and measured, for summary.json; both are printed too.
    """
    longest = batches.longest_row()
    samples = [batches.dataset[i] for i in longest]
    lengths = [batches.dataset.lengths[i] - 1 for i in longest]
    plan = configure_memory(worker, planner, lengths, batches.objective.weight(samples), compiled)
    start = time.perf_counter()
    worker.dry_run_step(batches.row([batches.dataset[i] for i in batches.shortest_row()]))
    if compiled:
        seconds = time.perf_counter() - start
        worker.fabric.print(f"the first step, in which the blocks are compiled, took {seconds:.0f} s")
    held = hardware.reset_peak(worker.model)
    row = batches.row(samples)
    worker.dry_run_step(row)
    measured, planned = hardware.peak_since_reset() - held, plan.train - plan.weights
    worker.fabric.print(
        f"memory: a step on the longest packed row, {row.tokens} tokens, took {measured / 1e9:.2f} GB beside the model "
        f"({planned / 1e9:.2f} GB planned)"
    )
    return {"step_bytes_planned": planned, "step_bytes_measured": measured}
