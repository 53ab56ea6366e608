"""Checks of the model: what trains, that batches, kernels, caches and merging compute what they should."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_gpt.conversion.logits import difference
from lit_gpt.kernels.policy import policy, use_policy
from lit_gpt.training.selfcheck.finding import Finding, within
from lit_gpt.training.selfcheck.subject import Subject, decode_logits, tokens_of

Gradients = dict[str, Tensor]
ANSWER, PROMPT = 8, 48  # tokens that are decoded, after at most so many of a prompt
LISTED = 4  # names in a line


def check_model(subject: Subject) -> Iterator[Finding]:
    """Yield the findings about the model. Merging, which is last, leaves the model merged."""
    yield attached(subject)
    yield (leak := packed(subject))
    yield trains(subject)
    yield cut(subject) if leak.passed else unjudged("cut", "samples that are packed see one another")
    yield (by_kernels := kernels(subject))
    yield unjudged("cached", "the kernels are off") if by_kernels.passed is False else cached(subject)
    yield merge(subject)


def unjudged(name: str, why: str) -> Finding:
    return Finding(name, None, f"not judged, for {why}")


def attached(subject: Subject) -> Finding:
    """Check that a finetuned file changes the logits, or that what is freshly attached does not."""
    moved = difference(subject.start_logits, subject.base_logits)
    if subject.finetuned:
        says = f"the finetuned file moves the base's logits by {moved:.1e} of their norm"
        return Finding("finetuned", moved > 1e-6, says, {"moved": moved})
    return within("fresh", "freshly attached, the logits are the base's", moved, subject.tolerance)


@torch.no_grad()
def packed(subject: Subject) -> Finding:
    """Check that a sample in a packed row gets the logits that it gets alone."""
    model, device = subject.model, subject.worker.fabric.device
    row, off, at = subject.objective.collate(subject.samples).to(device), 0.0, 0
    together = model(row.idx, segments=row.segments)
    for sample in subject.samples:
        ids = subject.row(sample)
        off = max(off, difference(together[:, at : at + ids.size(1)], model(ids)))
        at += ids.size(1)
    claim = f"each of {len(subject.samples)} samples has the same logits packed and alone"
    return within("packed", claim, off, subject.tolerance)


def gradients(subject: Subject, cuts: list[int]) -> Gradients:
    """Return the gradients of a batch that is cut into rows of so many samples, by the run's own backward pass."""
    model, worker, rest = subject.model, subject.worker, list(subject.samples)
    weight = subject.objective.weight(rest)
    model.zero_grad(set_to_none=True)
    for number, n in enumerate(cuts, 1):
        row, rest = subject.objective.collate(rest[:n]).to(worker.fabric.device), rest[n:]
        worker.backward(row, weight, more=number < len(cuts))
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(found: Gradients, wanted: Gradients) -> float:
    """Return by how much gradients differ, relative to the norm of those wanted."""
    if found.keys() != wanted.keys():
        return float("inf")
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    return (torch.stack([(found[name] - g).norm() for name, g in wanted.items()]).norm() / norm).item()


def trains(subject: Subject) -> Finding:
    """Check that every tensor of the method gets a gradient, and no other does."""
    model = subject.model
    declared = set(dict(model.named_parameters())) if subject.method.trains_base else declared_by(model)
    got = gradients(subject, [len(subject.samples)])
    without = sorted(name for name in declared if name not in got or not got[name].any())
    others = sorted(got.keys() - declared)
    count = sum(model.get_parameter(name).numel() for name in declared)
    says = (
        f"{len(declared) - len(without)} of the {len(declared)} tensors of {subject.method.name} ({count:,} "
        f"parameters) get a gradient, {len(others)} others do"
    )
    says += f"; none: {listed(without)}" if without else ""
    says += f"; too many: {listed(others)}" if others else ""
    figures = {"tensors": sorted(declared), "without_gradient": without, "others": others, "parameters": count}
    return Finding("trains", not without and not others, says, figures)


def declared_by(model: nn.Module) -> set[str]:
    """Return the names of the parameters that attached modules say they train."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in getattr(module, "trained_parameters", ())
    }


def listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def cut(subject: Subject) -> Finding:
    """Check that a batch has the same gradient however it is cut into rows: the mean over its tokens."""
    n = len(subject.samples)
    whole = gradients(subject, [n])
    furthest = max(distance(gradients(subject, cuts), whole) for cuts in ([1] * n, [1, n - 1]))
    return within("cut", "any cut of a batch into packed rows gives the same gradient", furthest, subject.tolerance)


def kernels(subject: Subject) -> Finding:
    """Check that the loss and its gradients by the kernels that serve here are those of the formulas."""
    if subject.worker.fabric.device.type == "cpu" and policy().fused is False:
        return Finding("kernels", None, "torch's operators serve on this CPU; --compile true takes the kernels")
    batch = [len(subject.samples)]
    by_kernels = gradients(subject, batch)
    with use_policy(cpp=False, fused=False):
        by_formulas = gradients(subject, batch)
    claim = "the gradient by the kernels of this machine is the formulas'"
    return within("kernels", claim, distance(by_kernels, by_formulas), subject.tolerance)


@torch.no_grad()
def cached(subject: Subject) -> Finding:
    """Check that decoding with a cache gives the logits of the whole text, read anew for each token."""
    model = subject.model
    room = max(1, min(PROMPT, model.config.block_size - ANSWER))
    prompt = tokens_of(subject.objective, min(subject.samples, key=lambda s: len(s.tokens)))[:room].tolist()
    ids, decoded = decode_logits(model, prompt, ANSWER, subject.step)
    device, furthest = subject.worker.fabric.device, 0.0
    for i, logits in enumerate(decoded, len(prompt)):
        whole = model(torch.tensor([ids[:i]], device=device), last=True).flatten()
        furthest = max(furthest, difference(logits.float(), whole.float()))
    claim = f"{ANSWER} tokens decoded with a cache have the logits of the whole text"
    return within("cached", claim, furthest, subject.tolerance)


@torch.no_grad()
def merge(subject: Subject) -> Finding:
    """Check that merging keeps what was trained, as it is and in the dtype in which the base is stored."""
    method, model = subject.method, subject.model
    if not method.merges:
        return Finding("merge", None, f"{method.name} stays beside its base")
    if subject.finetuned:
        method.load_state(model, subject.start, "the finetuned file")
    idx = subject.idx
    apart = model(idx)
    method.merge(model)
    off = difference(model(idx), apart)
    found = within("merge", "merged, the logits are those of base and method apart", off, subject.tolerance)
    change = (apart - subject.base_logits).flatten().double()
    if not change.any():
        return found
    dtype = subject.base.dtype
    for tensor in model.parameters():
        tensor.data = tensor.data.to(dtype).to(tensor.dtype) if tensor.is_floating_point() else tensor.data
    arrived = ((model(idx) - subject.base_logits).flatten().double() @ change / (change @ change)).item()
    stored = str(dtype).removeprefix("torch.")
    says = f"{found.says}; stored in {stored}, {arrived:.0%} of the change of the logits is kept"
    figures = found.figures | {"kept": arrived, "stored_in": stored}
    return Finding("merge", found.passed, says, figures)
