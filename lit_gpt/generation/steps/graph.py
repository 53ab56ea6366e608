"""The step of one more token on CUDA, captured once as a graph, from the embedding to the token that is drawn.

The host does no more than to start the graph: token and positions lie on the device, where each step leaves them as the
next wants them. So the next step is started before the token of this one is looked at; that it was not wanted, as
behind a stop token, costs nothing that is kept.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lit_gpt.generation.sampling import RowSampling, sample_rows
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps.cuda_tape import CudaTape
from lit_gpt.generation.steps.tape import Unsupported, changed, check_places, versions
from lit_gpt.kernels.cuda.decoding.rows import exponential_noise
from lit_gpt.kernels.cuda.gemv import FEW_ROWS
from lit_gpt.kernels.cuda.launch import DTYPES, serves_on
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache

SHORTEST = 256  # positions that the graph of the shortest sequences goes up to; each next one to twice as many
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph, and return what replays it. It must be one that may be taken more than once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated on first use cannot be captured
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def eager(step: Callable[[], None]) -> Callable[[], None]:
    """Capture nothing: what stands for a graph on a CPU takes the step itself."""
    return step


@dataclass
class Turn:
    """A step that is under way.

    Attributes:
        rows: whose tokens it draws.
        lengths: how many tokens each had before.
        tokens: int64 (rows,), on the host; `done` tells when.
    """

    rows: list[DecodingRow]
    lengths: list[int]
    tokens: Tensor
    done: Any

    def wait(self) -> list[int]:
        """Return the tokens."""
        if self.done is not None:
            self.done.synchronize()
        return self.tokens.tolist()


class GraphStep:
    """Takes a Step by a graph of a CudaTape, with the logits of lit_gpt.generation.sequence.eager_step.

    There is one graph for each power of two of rows, each power of two of positions from 256 on, and each way to draw
    tokens. It serves any cache, wherever that lies.

    Args:
        n: rows that are expected; more can follow.
        capture: makes a graph of a step.

    Raises:
        Unsupported: there is no kernel for some part of the model, or for its device.
    """

    def __init__(self, model: GPT, n: int = 1, capture: Capture | None = None) -> None:
        self.model = model
        self.capture = capture or (cuda_graph if model.wte.weight.is_cuda else eager)
        self.seeds: WeakKeyDictionary[DecodingRow, Tensor] = WeakKeyDictionary()
        self.cache: KVCache = []
        self.kind, self.drawn = "greedy", list[int]()
        self.record(n)

    def record(self, n: int) -> None:
        """Make the operations, of at least n rows."""
        served = self.model.dtype in DTYPES and serves_on(self.model.wte.weight)
        if self.model.training or not served or n > FEW_ROWS:
            raise Unsupported("a device, dtype, mode, or so many rows")
        n = 1 << (n - 1).bit_length()
        device = self.model.wte.weight.device
        self.tape, self.seen = CudaTape(self.model, n), versions(self.model)
        self.sampling = RowSampling.zeros(n, device)
        self.noise = torch.empty(n, self.tape.logits.size(1), dtype=torch.float32, device=device)
        self.graphs: dict[tuple[int, int, str], Callable[[], None]] = {}
        self.under_way: deque[Turn] = deque()
        self.cache = []

    def __call__(self, rows: list[DecodingRow], cache: KVCache) -> Tensor:
        """Return float32 logits (len(rows), padded_vocab_size), which the next call overwrites."""
        self.begin(rows, cache)
        self.replay(rows, [len(row.ids) for row in rows], "logits")
        grow(self.model, rows)
        return self.tape.logits[: len(rows)]

    def draw(self, rows: list[DecodingRow], cache: KVCache) -> list[int]:
        """Return the token that follows each row, drawn as it asks for; the step behind it may have been started."""
        if not self.goes_on(rows, cache):
            self.begin(rows, cache)
            kind = self.sampling.choose([row.sampling for row in rows])
            if kind != "greedy":
                self.sampling.seeds[: len(rows)].copy_(torch.cat([self.seed(row) for row in rows]))
            self.kind = kind
            self.start(rows, [len(row.ids) for row in rows])
        turn = self.under_way.popleft()
        ahead = [length + 1 for length in turn.lengths]
        if not self.under_way and self.may_go_on(rows, ahead):
            self.start(rows, ahead)
        self.drawn = turn.wait()
        grow(self.model, rows)
        return self.drawn

    def goes_on(self, rows: list[DecodingRow], cache: KVCache) -> bool:
        """Return whether the step that is under way is the one that these rows want."""
        if not self.under_way or cache is not self.cache:
            return False
        turn = self.under_way[0]
        lengths = [len(row.ids) for row in rows]
        return turn.rows == rows and turn.lengths == lengths and self.drawn == [row.ids[-1] for row in rows]

    def may_go_on(self, rows: list[DecodingRow], lengths: list[int]) -> bool:
        """Return whether rows of these lengths can take another step by the same angles and in the same cache."""
        is_long = self.model.rope.is_long
        wanted = all(row.remaining > 1 for row in rows)
        return wanted and max(lengths) <= self.tape.limit and all(is_long(n) == is_long(n - 1) for n in lengths)

    def begin(self, rows: list[DecodingRow], cache: KVCache) -> None:
        """Put the rows' last tokens and positions where the graph reads them."""
        self.under_way.clear()
        if self.model.training or changed(self.seen, versions(self.model)) or self.tape.n < len(rows):
            self.record(max(len(rows), min(cache[0].rows, FEW_ROWS)))
        self.cache, tape = cache, self.tape
        tape.use(rows[0].cache if len(rows) == 1 else cache)
        tokens, positions = [row.ids[-1] for row in rows], [len(row.ids) - 1 for row in rows]
        check_places(self.model, tape.limit, tokens, positions)
        n = bucket(len(rows))
        missing = [0] * (n - len(rows))
        addresses = tape.choice.addresses.tolist() if tape.choice else [0] * len(rows)
        state = torch.tensor([tokens + missing, positions + [-1] * len(missing), addresses + missing])
        for target, source in zip((tape.tokens, tape.positions, tape.addresses), state, strict=True):
            target[:n].copy_(source, non_blocking=True)

    def start(self, rows: list[DecodingRow], lengths: list[int]) -> None:
        """Start the step of rows of these lengths, and the copy of its tokens to the host."""
        self.replay(rows, lengths, self.kind)
        tokens, done = self.tape.tokens[: len(rows)], None
        if tokens.is_cuda:
            host = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
            host.copy_(tokens, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            host = tokens.clone()
        self.under_way.append(Turn(list(rows), lengths, host, done))

    def seed(self, row: DecodingRow) -> Tensor:
        """Return a row's seed, int64 (1,), which its generator draws once."""
        if row not in self.seeds:
            device = self.tape.tokens.device
            self.seeds[row] = torch.randint(2**62, (1,), generator=row.generator, device=device)
        return self.seeds[row]

    def replay(self, rows: list[DecodingRow], lengths: list[int], kind: str) -> None:
        """Run the graph for so many rows of these lengths that ends as `kind` says, and capture it first."""
        n, longest = bucket(len(rows)), max(SHORTEST, bucket(max(lengths)))
        key = n, longest, kind
        if key not in self.graphs:
            state = self.tape.tokens.clone(), self.tape.positions.clone()
            self.graphs[key] = self.capture(lambda: self.step(n, longest, kind))
            self.tape.tokens.copy_(state[0])  # which a step that was taken to warm up has left further on
            self.tape.positions.copy_(state[1])
        self.graphs[key]()

    def step(self, n: int, longest: int, kind: str) -> None:
        """Compute the logits of n rows; unless they are all that is wanted, draw tokens and go to the next position."""
        tape, sampling = self.tape, self.sampling
        tape.longest = longest
        logits = tape.run(n)
        if kind == "logits":
            return
        if kind != "greedy":
            exponential_noise(self.noise[:n], sampling.seeds[:n], tape.positions[:n])
        drawn = sample_rows(logits, sampling, self.noise[:n], kind)
        tape.tokens[:n].copy_(drawn)
        tape.positions[:n].add_((tape.positions[:n] >= 0).to(torch.int64))


def bucket(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def grow(model: GPT, rows: list[DecodingRow]) -> None:
    """Count the token that a step has added to each row's cache."""
    for row in rows:
        row.cache[0].uses_long_rope = model.rope.is_long(len(row.ids))
        for layer in row.cache:
            layer.length += 1
