"""What a run will need before it starts: parameters, and the memory of each of its phases.

Nothing is guessed from formulas. The very step that training takes runs on tensors without contents (FakeTensorMode)
while every storage that lives is counted. Blocks are alike, so two small models tell what each further block adds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_gpt.conversion import parity
from lit_gpt.kernels import ops
from lit_gpt.methods import adapter, lora
from lit_gpt.methods.method import Method
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.model.inputs import Segments, Targets
from lit_gpt.quantization import formats, modules
from lit_gpt.training.activation_checkpointing import KINDS, apply_activation_checkpointing
from lit_gpt.training.memory_tracker import MemoryTracker
from lit_gpt.training.optimizers import EIGHT_BIT, OPTIMIZERS, allocate, optimizer_of

CPU_ROW = 2048  # tokens of a packed row on a CPU: its products gain little beyond, and activations grow


@dataclass(frozen=True)
class Plan:
    """Parameters; and in bytes what is held throughout, and the peaks of the phases, what is held included."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    # a training step is at its peak either at the loss, or when the backward pass begins, with all activations, or when
    # that ends, with all gradients, or in the optimizer's step
    forward: int
    backward_begins: int
    backward_ends: int
    step: int
    validate: int
    answer: int  # the sample that is shown at a validation
    save: int
    merge: int  # of LoRA into its base, on the CPU beside the mapped file; 0 for other methods
    block: int = 0  # weights of one block

    @property
    def train(self) -> int:
        return max(self.forward, self.backward_begins, self.backward_ends, self.step)

    @property
    def evaluate(self) -> int:
        return max(self.validate, self.answer)

    @property
    def activations(self) -> int:
        """What is held at most until the backward pass begins, beside weights and optimizer."""
        return max(self.forward, self.backward_begins) - self.weights - self.optimizer

    @property
    def peak(self) -> int:
        return max(self.train, self.evaluate, self.save)

    def resident(self) -> "Plan":
        """What a process on the CPU holds for it: its heap has holes, and libraries want room to work in.

        Measured for the four methods on rows of 1,000 and 1,600 tokens of SmolLM2-135M: 3 to 25 % more than the tensors
        of a step themselves, or 2 to 5 % with every tensor in a mapping of its own, which is slow.
        """
        names = ("forward", "backward_begins", "backward_ends", "step", "validate", "answer")
        kept = self.weights + self.optimizer
        beside = {name: getattr(self, name) - kept for name in names}
        return replace(self, **{name: kept + int(1.12 * n) + 25_000_000 for name, n in beside.items()})

    def shared(self, hp: SimpleNamespace) -> "Plan":
        """One rank's part by `--strategy`; activations are each rank's own."""
        ranks, zero = hp.devices * hp.num_nodes, hp.strategy == "deepspeed"
        if ranks == 1 or hp.strategy not in ("fsdp", "deepspeed"):
            return self
        weights, gradients, optimizer = self.weights, self.gradients // ranks, self.optimizer // ranks
        if hp.strategy == "fsdp" or hp.zero_stage == 3:
            weights = self.weights // ranks + 2 * self.block  # one computes while the next is gathered
        if zero:
            optimizer += 4 * self.trainable // ranks  # the float32 originals
        if zero and hp.zero_offload:
            weights, gradients, optimizer = (2 * self.block if hp.zero_stage == 3 else weights), 0, 0
        off = weights - self.weights + optimizer - self.optimizer
        peaks = {
            name: getattr(self, name) + off for name in ("forward", "backward_begins", "validate", "answer", "save")
        }
        ends = {name: getattr(self, name) + off + gradients - self.gradients for name in ("backward_ends", "step")}
        return replace(self, weights=weights, gradients=gradients, optimizer=optimizer, **peaks, **ends)


def plan(config: Config, method: Method, hp: SimpleNamespace, lengths: list[int], supervised: int, cuda: bool) -> Plan:
    """The plan of a run on one device.

    Args:
        hp: the flags of finetune/lora.py.
        lengths: tokens of each sample in the longest packed row.
        supervised: how many of the row's tokens are.
        cuda: plan for a CUDA device; there need not be one.
    """
    few = method.settings.get("start_layer", 0) + 2  # of layers, that all kinds are among them
    if config.n_layer <= few + 1:
        found = simulate(config, method, hp, lengths, supervised, cuda)
        return found if cuda else found.resident()
    one, two = (
        astuple(simulate(replace(config, n_layer=n), method, hp, lengths, supervised, cuda)) for n in (few, few + 1)
    )
    grown = [a + (b - a) * (config.n_layer - few) for a, b in zip(one, two, strict=True)]
    *sums, _, _ = grown
    found = Plan(*sums, merge=two[-2], block=two[2] - one[2])  # a merge goes block by block
    return found if cuda else found.resident()


Row = tuple[list[int], int]  # a packed row's lengths, and how many of its tokens are supervised


def choose_settings(
    config: Config, method: Method, hp: SimpleNamespace, rows: list[Row], cuda: bool, memory: int
) -> tuple[str, Row, Plan]:
    """The first `--activation_checkpointing` that the flags admit, and the first of `rows`, whose plan fits.

    Args:
        memory: of the device, in bytes. If nothing fits, the last is taken of both.
    """
    asked = hp.activation_checkpointing
    for kind in (KINDS if cuda else KINDS[:-1]) if asked == "auto" else (asked,):
        flags = SimpleNamespace(**vars(hp) | {"activation_checkpointing": kind})
        for row in rows:
            found = plan(config, method, flags, *row, cuda).shared(hp)
            if 1.1 * found.peak < memory:
                return kind, row, found
    return kind, row, found


def row_tokens(config: Config, method: Method, hp: SimpleNamespace, memory: int | None) -> int:
    """Tokens of a packed row, where the flags leave them open.

    Args:
        memory: of a CUDA device, in bytes; None: for the CPU.
    """
    if memory is None:
        return CPU_ROW
    rows = [([1024] * (tokens // 1024), tokens) for tokens in (16384, 8192, 4096, 2048)]
    _, (_, tokens), found = choose_settings(config, method, hp, rows, True, memory)
    return tokens if 1.1 * found.peak < memory else 1024


def plan_flags(config: Config, method: Method, hp: SimpleNamespace) -> tuple[Plan, list[int], str]:
    """The plan of one rank by the flags of scripts/plan.py, the packed row that it is of, and how activations are kept.

    The row is the worst that the flags admit: of samples as long as they may be, all their tokens supervised.
    """
    longest, cuda = min(hp.max_seq_length or config.block_size, config.block_size), hp.device == "cuda"
    memory = int((hp.memory_gb or 80) * 1e9)
    tokens = hp.micro_batch_tokens or row_tokens(config, method, hp, memory if cuda else None)
    n = hp.micro_batch_size or max(1, tokens // longest)
    kind, (lengths, _), found = choose_settings(config, method, hp, [([longest] * n, n * longest)], cuda, memory)
    return found, lengths, kind


def first_trained(method: Method) -> int:
    return method.settings.get("start_layer", 0) if method.name == adapter.METHOD else 0


def simulate(
    config: Config, method: Method, hp: SimpleNamespace, lengths: list[int], supervised: int, cuda: bool
) -> Plan:
    with torch.device("meta"):
        base = GPT(config).to(method.weight_dtype(hp))
        model = method.attach(modules.attach(base, method.quantize) if method.quantize else base)
    apply_activation_checkpointing(model, hp.activation_checkpointing)
    counts = modules.count_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    with FakeTensorMode(), MemoryTracker() as live, kernels_of(cuda), stand_ins():
        parameters = materialize(model)
        row = row_like(lengths, supervised)
        weights = live.now
        optimizer = optimizer_of(parameters, stand_in(hp))
        allocate(optimizer)
        states = live.now - weights
        arithmetic = method.autocast(hp, "cpu")
        forward, begins, ends = live.during_passes(model.train(), first_trained(method), row, arithmetic)
        gradients = live.now - weights - states
        step = live.during(optimizer.step)
        optimizer.zero_grad()
        model.eval().requires_grad_(False)
        validate = live.during(lambda: model(row[0], segments=row[1], targets=row[2]))
        answer = live.during(lambda: answer_once(model, row[0], row[1], hp.sample_tokens))
        merge = live.during(lambda: merge_once(model)) - live.now if method.name == lora.METHOD else 0
    unseen = unseen_state(parameters, hp.optimizer, cuda)
    peaks = (forward, begins, ends, step, validate, answer, weights + states)
    return Plan(*counts, weights, gradients, states + unseen, *(peak + unseen for peak in peaks), merge)


def materialize(model: nn.Module) -> list[nn.Parameter]:
    """Put tensors that have a place but no contents for a model's meta ones; returns those that train."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                like = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[parameter] = nn.Parameter(like, requires_grad=parameter.requires_grad)
            module._parameters[name] = made.get(parameter)
    for rope in (model.rope, model.local_rope):
        rope.frequencies = torch.empty(rope.frequencies.shape)
    return [parameter for parameter in made.values() if parameter.requires_grad]


def row_like(lengths: list[int], supervised: int) -> tuple[Tensor, Segments, Targets]:
    """A packed row of samples of these lengths, as far as its shapes go."""
    n = sum(lengths)
    segments = Segments(tuple(lengths), torch.zeros(len(lengths) + 1, dtype=torch.int32), whole_numbers(n))
    return whole_numbers(n).unsqueeze(0), segments, Targets(whole_numbers(supervised), whole_numbers(supervised))


def whole_numbers(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def answer_once(model: GPT, idx: Tensor, segments: Segments, tokens: int) -> None:
    """Read the longest sample into a cache that has room for an answer."""
    prompt = idx[:, : max(segments.lengths)]
    model(prompt, cache=model.kv_cache(1, prompt.size(1) + tokens), last=True)


def merge_once(model: GPT) -> None:
    """What scripts/merge_lora.py holds in turn: a merged weight, then, to compare, a module in float32 and logits."""
    for layer in lora.lora_layers(model).values():
        layer.merged()
    largest = max((model.wte, model.h[0], model.lm_head), key=size)
    widened = [p.float() for p in largest.parameters()]  # noqa: F841 (held together)
    torch.empty(3 * parity.POSITIONS, model.config.padded_vocab_size)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stand_in(hp: SimpleNamespace) -> SimpleNamespace:
    """The flags with an optimizer that holds no state in place of one whose kernels want tensors with contents."""
    if of_torch(hp.optimizer):
        return hp
    return SimpleNamespace(**vars(hp) | {"optimizer": "sgd", "optimizer_args": {}})


def unseen_state(parameters: list[nn.Parameter], name: str, cuda: bool) -> int:
    """Bytes of the state of optimizers that are not PyTorch's.

    bitsandbytes' AdamW keeps two numbers of 8 bits for each weight and a scale for each 256 of them (Dettmers et al.
    2022), or of 32 bits for tensors under 4096; what is paged can go to host memory. Others are taken to be like AdamW.
    """
    if of_torch(name):
        return 0
    counts = [p.numel() for p in parameters]
    if name not in EIGHT_BIT:
        return 8 * sum(counts)
    if cuda and name.startswith("paged"):
        return 0
    return sum(int(n * (2 + 8 / 256)) if n >= 4096 else 8 * n for n in counts)


def of_torch(optimizer: str) -> bool:
    return OPTIMIZERS.get(optimizer, optimizer).startswith("torch.")


@contextmanager
def kernels_of(cuda: bool) -> Iterator[None]:
    """Let the model choose the kernels of a CUDA device. Fake CUDA tensors want a torch that is built for CUDA."""
    if not cuda:
        yield
        return
    flash = mock.patch("lit_gpt.model.sdpa.flash_supports", lambda q: q.size(-1) <= 256)
    with flash, ops.off(), mock.patch("lit_gpt.quantization.formats.CPU_PIECE", formats.PIECE):
        yield


@contextmanager
def stand_ins() -> Iterator[None]:
    """For what reads contents; and what goes to host memory is not counted."""
    with (
        mock.patch("lit_gpt.model.moe.rows_per_expert", evenly),
        mock.patch("lit_gpt.training.activation_checkpointing.to_host", lambda x: (x.shape, x.dtype)),
        mock.patch(
            "lit_gpt.training.activation_checkpointing.from_host", lambda kept: torch.empty(kept[0], dtype=kept[1])
        ),
    ):
        yield


def evenly(experts: Tensor, n_expert: int) -> list[int]:
    """In the place of the router's choice, which wants contents: each expert gets as many rows as the others.

    What a step holds does not depend on that, for all rows lie in one tensor, sorted by expert.
    """
    rows = len(experts)
    return [rows * (i + 1) // n_expert - rows * i // n_expert for i in range(n_expert)]
