"""Plans what a run will need before it starts: parameters, and the memory of each of its phases.

Nothing is guessed from formulas. The very step that training takes runs on tensors without contents (FakeTensorMode)
while every storage that lives is counted. Blocks are alike, so two small models tell what each further block adds.
"""

import itertools
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_gpt.conversion.reference_prompts import POSITIONS
from lit_gpt.distributed.args import DeviceArgs
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods.method import Method
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, quantize
from lit_gpt.quantization.modules import count_parameters
from lit_gpt.training import optimizers
from lit_gpt.training.args import OPTIMIZERS, OptimizationArgs, TrainArgs
from lit_gpt.training.checks import length_limit
from lit_gpt.training.memory.activation_checkpointing import KINDS, apply_activation_checkpointing
from lit_gpt.training.memory.tracker import MemoryTracker
from lit_gpt.training.objectives import Objective
from lit_gpt.training.optimizers import EIGHT_BIT, groups, optimizer_for

CPU_ROW = 2048  # tokens of a packed row on a CPU: its products gain little beyond, and activations grow


@dataclass(frozen=True)
class Plan:
    """Counts parameters, and in bytes what is held throughout and the peak of each phase, what is held included."""

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
    merge: int  # into the base, on the CPU beside the mapped file; 0 for methods that do not merge
    block: int = 0  # weights of one block

    @property
    def train(self) -> int:
        return max(self.forward, self.backward_begins, self.backward_ends, self.step)

    @property
    def evaluate(self) -> int:
        return max(self.validate, self.answer)

    @property
    def activations(self) -> int:
        """Return what is held at most until the backward pass begins, beside weights and optimizer."""
        return max(self.forward, self.backward_begins) - self.weights - self.optimizer

    @property
    def peak(self) -> int:
        return max(self.train, self.evaluate, self.save)

    def resident(self) -> "Plan":
        """Return what a process on the CPU holds for this: its heap has holes, and libraries want room to work in.

        Measured for the four methods on rows of 1,000 and 1,600 tokens of SmolLM2-135M: 3 to 25 % more than the tensors
        of a step themselves, or 2 to 5 % with every tensor in a mapping of its own, which is slow.
        """
        names = ("forward", "backward_begins", "backward_ends", "step", "validate", "answer")
        kept = self.weights + self.optimizer
        beside = {name: getattr(self, name) - kept for name in names}
        return replace(self, **{name: kept + int(1.12 * n) + 25_000_000 for name, n in beside.items()})

    def sharded(self, args: DeviceArgs) -> "Plan":
        """Return one rank's part of the plan by `--strategy`; activations are each rank's own."""
        ranks, zero = args.ranks, args.strategy == "deepspeed"
        if ranks == 1 or args.strategy not in ("fsdp", "deepspeed"):
            return self
        weights, gradients, optimizer = self.weights, self.gradients // ranks, self.optimizer // ranks
        if args.strategy == "fsdp" or args.zero_stage == 3:
            weights = self.weights // ranks + 2 * self.block  # one computes while the next is gathered
        if zero:
            optimizer += 4 * self.trainable // ranks  # the float32 originals
        if zero and args.zero_offload:
            weights, gradients, optimizer = (2 * self.block if args.zero_stage == 3 else weights), 0, 0
        off = weights - self.weights + optimizer - self.optimizer
        peaks = {
            name: getattr(self, name) + off for name in ("forward", "backward_begins", "validate", "answer", "save")
        }
        ends = {name: getattr(self, name) + off + gradients - self.gradients for name in ("backward_ends", "step")}
        return replace(self, weights=weights, gradients=gradients, optimizer=optimizer, **peaks, **ends)


Row = tuple[list[int], int]  # tokens of each sample of a packed row, and the row's weight (supervised tokens)


@dataclass(frozen=True)
class MemoryPlanner:
    """Plans the memory of a run.

    Attributes:
        args: the arguments of the run.
        quantize: the format of the base's weights; None: they are not quantized.
        cuda: plan for a CUDA device; there need not be one.
        memory: how much the device has, in bytes.
        plans: those that were made already, by row and activation checkpointing.
    """

    config: Config
    method: Method
    objective: Objective
    args: TrainArgs
    quantize: str | None
    cuda: bool
    memory: int
    plans: dict[tuple[Any, ...], Plan] = field(init=False, default_factory=dict, repr=False, compare=False)

    def plan(self, row: Row, checkpointing: str) -> Plan:
        """Return the plan of one rank for a run whose longest packed row is `row`.

        Args:
            checkpointing: a kind of activation checkpointing.
        """
        key = (*row[0], row[1], checkpointing)
        if key not in self.plans:
            self.plans[key] = self.extrapolated(row, checkpointing)
        return self.plans[key]

    def extrapolated(self, row: Row, checkpointing: str) -> Plan:
        """Return the plan for all layers, from what the first few need; of a hybrid, whose layers differ, from all."""
        few = self.method.first_uniform_layer + 2  # layers, that all kinds are among them
        if self.config.n_layer <= few + 1 or self.config.layers_differ:
            plan = self.simulate(self.config, row, checkpointing)
        else:
            one, two = (self.simulate(replace(self.config, n_layer=n), row, checkpointing) for n in (few, few + 1))
            more, figures = self.config.n_layer - few, asdict(two)
            plan = Plan(**{name: a + (figures[name] - a) * more for name, a in asdict(one).items()})
            plan = replace(plan, merge=two.merge, block=two.weights - one.weights)  # a merge goes block by block
        return (plan if self.cuda else plan.resident()).sharded(self.args.devices)

    def choose_settings(self, rows: list[Row]) -> tuple[str, Row, Plan]:
        """Return the first activation checkpointing that the flags admit, and the first of `rows`, whose plan fits.

        If nothing fits, return the last of both.
        """
        asked = self.args.memory.activation_checkpointing
        kinds = self.kinds if asked == "auto" else (asked,)
        for kind, row in itertools.product(kinds, rows):
            plan = self.plan(row, kind)
            if self.fits(plan):
                break
        return kind, row, plan

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of activation checkpointing that the device admits: a CPU has nowhere to offload to."""
        return KINDS if self.cuda else KINDS[:-1]

    def fits(self, plan: Plan) -> bool:
        return 1.1 * plan.peak < self.memory

    def row_tokens(self) -> int:
        """Return how many tokens a packed row is to hold, where the flags leave it open."""
        if not self.cuda:
            return CPU_ROW
        rows = [([1024] * (tokens // 1024), tokens) for tokens in (16384, 8192, 4096, 2048)]
        _, (_, tokens), plan = self.choose_settings(rows)
        return tokens if self.fits(plan) else 1024

    def limited_to(self, tokens: int) -> "MemoryPlanner":
        """Return the planner of a run whose samples are no longer than this."""
        batch = replace(self.args.batch, max_seq_length=tokens)
        return replace(self, args=replace(self.args, batch=batch))

    def worst_row(self) -> Row:
        """Return the largest row that the flags admit: samples as long as may be, all their tokens supervised."""
        batch, virtual = self.args.batch, self.method.virtual_tokens
        longest = length_limit(self.args, self.config, virtual) + virtual
        n = batch.micro_batch_size or max(1, (batch.micro_batch_tokens or self.row_tokens()) // longest)
        return [longest] * n, n * longest

    def simulate(self, config: Config, row: Row, checkpointing: str) -> Plan:
        """Run a step, a validation and an answer of a model of this configuration without contents."""
        method, precision = self.method, self.args.memory.precision
        with torch.device("meta"):
            base = GPT(config).to(method.weight_dtype(precision))
            model = method.attach(quantize(base, self.quantize) if self.quantize else base)
        model.noise_alpha = self.args.optimization.neftune_alpha
        model.attend_in_groups(self.args.optimization.attention_group)
        apply_activation_checkpointing(model, checkpointing)
        counts = count_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
        with FakeTensorMode(), MemoryTracker() as tracker, use_policy(contents=False, **self.simulated_device()):
            parameters = materialize(model)
            packed = self.objective.plan_row(*row)
            weights = tracker.now
            stand_in_args = stand_in(self.args.optimization)
            optimizer = optimizer_for(groups(model, method, stand_in_args), stand_in_args)
            optimizers.allocate(optimizer)
            states = tracker.now - weights
            loss = partial(self.loss, model, packed)
            forward, begins, ends = tracker.during_passes(model.train(), method.first_trained_layer, loss)
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
            step = tracker.during(optimizer.step)
            optimizer.zero_grad()
            model.eval().requires_grad_(False)
            validate = tracker.during(lambda: self.objective.loss(model, packed))
            answer = tracker.during(lambda: answer_once(model, max(row[0]), self.args.watch.sample_tokens))
            merge = tracker.during(lambda: merge_once(model, method)) - tracker.now if method.merges else 0
        unseen = unseen_state(parameters, self.args.optimization.optimizer, self.cuda)
        peaks = {"forward": forward, "backward_begins": begins, "backward_ends": ends, "step": step}
        peaks |= {"validate": validate, "answer": answer, "save": weights + states}
        peaks = {name: peak + unseen for name, peak in peaks.items()}
        return Plan(*counts, weights, gradients, states + unseen, merge=merge, **peaks)

    def loss(self, model: GPT, row: Any) -> Tensor:
        with self.method.autocast(self.args.memory.precision, "cpu"):
            return self.objective.loss(model, row)

    def simulated_device(self) -> dict[str, bool]:
        """Return the policy by which the model chooses the kernels of the device that is planned for.

        Fake CUDA tensors would want a torch that is built for CUDA.
        """
        return {"simulate_cuda": True, "cpp": False} if self.cuda else {}


def materialize(model: GPT) -> list[nn.Parameter]:
    """Put tensors that have a place but no contents for a model's meta ones, and return those that train."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                like = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[parameter] = nn.Parameter(like, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for rope in (model.rope, model.local_rope):
        rope.frequencies = torch.empty(rope.frequencies.shape)
    return [parameter for parameter in made.values() if parameter.requires_grad]


def answer_once(model: GPT, length: int, tokens: int) -> None:
    """Read the longest sample into a cache that has room for an answer."""
    prompt = torch.zeros(1, length, dtype=torch.int64)
    model(prompt, cache=model.kv_cache(1, length + tokens), last=True)


def merge_once(model: GPT, method: Method) -> None:
    """Hold what scripts/merge_lora.py holds in turn: merged weights, then, to compare, a float32 module and logits."""
    method.hold_merge(model)
    parts = [model.wte, model.h[0], model.lm_head, *([model.layer_inputs] if model.layer_inputs is not None else [])]
    largest = max(parts, key=lambda part: sum(p.numel() for p in part.parameters()))
    widened = [p.float() for p in largest.parameters()]  # noqa: F841 (held together)
    torch.empty(3 * POSITIONS, model.config.padded_vocab_size)


def stand_in(args: OptimizationArgs) -> OptimizationArgs:
    """Return the arguments with an optimizer that holds no state for one whose kernels want tensors with contents."""
    return args if is_torchs(args.optimizer) else replace(args, optimizer="sgd", optimizer_args={})


def unseen_state(parameters: list[nn.Parameter], name: str, cuda: bool) -> int:
    """Return the bytes of state of an optimizer that is not PyTorch's.

    bitsandbytes' AdamW keeps two numbers of 8 bits for each weight and a scale for each 256 of them (Dettmers et al.
    2022), or of 32 bits for tensors under 4096; what is paged can go to host memory. Others are taken to be like AdamW.
    """
    if is_torchs(name):
        return 0
    counts = [p.numel() for p in parameters]
    if name not in EIGHT_BIT:
        return 8 * sum(counts)
    if cuda and name.startswith("paged"):
        return 0
    return sum(int(n * (2 + 8 / 256)) if n >= 4096 else 8 * n for n in counts)


def is_torchs(optimizer: str) -> bool:
    """Return whether an optimizer can step on tensors without contents: torch's and ours."""
    return OPTIMIZERS.get(optimizer, optimizer).startswith(("torch.", "lit_gpt."))
