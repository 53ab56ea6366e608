"""Decides which answers are continued: one thread takes the turns of a batch, in which answers join and leave."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

from torch import Tensor

from lit_gpt.generation.sequence import DecodingRow, Step
from lit_gpt.generation.stopping import AnswerText
from lit_gpt.methods.multi_lora import LoadedLoRA
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.serving.adapters import Adapters
from lit_gpt.serving.fair_queue import FairQueue
from lit_gpt.serving.prefixes import Prefixes, SharingBatch

PIECE = 256  # tokens of prompts that are read between two tokens of the answers that are on their way


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a drawn token, and of the likeliest, under the model itself (temperature 1)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What an answer has gained.

    Attributes:
        finish: why it ends here: stop, length or error; None: it goes on.
        tokens: how many have been drawn so far, a stop token included.
    """

    text: str
    tokens: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None


@dataclass(eq=False)
class Job:
    """An answer that is asked for.

    Attributes:
        emit: is called with each piece, on the scheduler's thread.
        top_logprobs: how many of the likeliest tokens to tell of at each place; None: tell of no log-probabilities.
    """

    row: DecodingRow
    stop_ids: tuple[int, ...]
    text: AnswerText
    emit: Callable[[Piece], None]
    top_logprobs: int | None = None
    tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of tokens whose text is not certain yet
    submitted: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.top_logprobs is not None:
            self.row.observe = self._observe

    def _observe(self, logits: Tensor, token: int) -> None:
        known = logits.float().log_softmax(-1).clamp_min(-9999)  # JSON has no infinities
        values, tokens = known.topk(self.top_logprobs or 0)
        top = list(zip(tokens.tolist(), values.tolist(), strict=True))
        self.logprobs.append(TokenLogprobs(token, float(known[token]), top))

    def take(self, token: int) -> None:
        """Take the next token. Where the answer ends by it, so does the row."""
        self.tokens += 1
        ended = token in self.stop_ids
        text = "" if ended else self.text.push(token)
        if ended or self.text.ended:
            self.row.remaining = 0
        finish = None if self.row.remaining else "stop" if ended or self.text.ended else "length"
        if finish:
            text += self.text.rest()
        if text or finish:
            told, self.logprobs = self.logprobs, []
            self.emit(Piece(text, self.tokens, told[: len(told) - ended], finish))


class QueueFull(Exception):
    """No more can wait.

    Attributes:
        retry_after: seconds after which some will have ended, by what answers have taken so far.
    """

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after


class Scheduler:
    """Continues answers in a batch; the others wait.

    Args:
        cache: a slot for each answer that is continued.
        kept: a slot for each that has ended and is kept for those that begin alike; None: none. The two are all the
            memory that keys and values ever take.
        choose: is told which rows the model is about to compute.
        max_queue: how many may wait beyond those that find a place.
        adapters: where the rows' LoRAs come from; None: there are none.
    """

    def __init__(
        self,
        model: GPT,
        cache: KVCache,
        kept: KVCache | None,
        step: Step,
        choose: Callable[[list[DecodingRow]], None],
        max_queue: int,
        adapters: Adapters | None = None,
    ) -> None:
        self.new_batch = partial(SharingBatch, model, cache, step, choose, PIECE, Prefixes(kept))
        self.batch, self.max_queue = self.new_batch(), max_queue
        self.slots, self.cache_bytes = self.batch.free, sum(x.k.nbytes + x.v.nbytes for x in (*cache, *(kept or ())))
        self.queue: FairQueue[Job] = FairQueue()
        self.jobs: dict[DecodingRow, Job] = {}  # those in the batch
        self.adapters = adapters
        self.arriving: dict[Job, Future[LoadedLoRA]] = {}  # those that have a place, and whose LoRA is being read
        self.gone: list[Job] = []  # whose clients have gone
        self.tasks: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.closed, self.mean_seconds = False, 1.0
        self.changed = threading.Condition()
        # the thread keeps to the kernel policy that holds here
        self.thread = threading.Thread(target=copy_context().run, args=(self._run,), name="scheduler", daemon=True)
        self.thread.start()

    @property
    def unfinished(self) -> int:
        """Return how many answers are continued or wait."""
        return len(self.jobs) + len(self.arriving) + len(self.queue)

    @property
    def most_waiting(self) -> int:
        """Return how many answers can be taken in at once, if none are there."""
        return self.max_queue + self.slots

    def submit(self, owner: str, jobs: list[Job]) -> None:
        """Have answers continued, in turns with those of other owners.

        Raises:
            QueueFull: not all of them find a place to wait.
        """
        with self.changed:
            waiting = self.unfinished + len(jobs)
            if waiting > self.most_waiting or self.closed:
                raise QueueFull(ceil(self.mean_seconds * waiting / self.slots))
            self.queue.push(owner, jobs)
            self.changed.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Continue these no more, as far as they have not ended."""
        with self.changed:
            self.gone += [job for job in jobs if not self.queue.remove(job)]
            self.changed.notify()

    def between_turns(self, function: Callable[[], Any]) -> "Future[Any]":
        """Call a function while no row is computed, such as one that limits the memory that the process may take."""
        future: Future[Any] = Future()
        with self.changed:
            if self.closed:
                future.cancel()
            else:
                self.tasks.append((future, function))
                self.changed.notify()
        return future

    def close(self) -> None:
        """End the thread; what is still continued is not."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
        for future, _ in self.tasks:
            future.cancel()

    def _run(self) -> None:
        while self._prepare():
            try:
                for row, token in self.batch.advance():
                    self._take(self.jobs[row], token)
            except Exception:  # the others who ask are to be served all the same
                traceback.print_exc(file=sys.stderr)
                self._fail()

    def _prepare(self) -> bool:
        """Wait for something to do, and let answers join and leave. Return whether to go on."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.tasks or self.gone or self.jobs or self._can_join())
            if self.closed:
                return False
            tasks, self.tasks, gone, self.gone = self.tasks, [], self.gone, []
            for job in gone:
                self.arriving.pop(job, None)
                if self.jobs.pop(job.row, None):
                    self.batch.leave(job.row)
            for job in [job for job, reading in self.arriving.items() if reading.done()]:
                self._arrive(job, self.arriving.pop(job))
            while self._free and self.queue:
                self._admit(self.queue.pop())
        for future, function in tasks:
            settle(future, function)
        return True

    @property
    def _free(self) -> int:
        return self.batch.free - len(self.arriving)

    def _can_join(self) -> bool:
        return bool(self._free and self.queue) or any(reading.done() for reading in self.arriving.values())

    def _wake(self, _: "Future[LoadedLoRA]") -> None:
        with self.changed:
            self.changed.notify()

    def _admit(self, job: Job) -> None:
        """Let an answer join, or have its LoRA read again before."""
        same = (reading for other, reading in self.arriving.items() if other.row.lora == job.row.lora)
        reading = next(same, None) or (self.adapters and self.adapters.fetch(job.row.lora))
        if reading:
            self.arriving[job] = reading
            reading.add_done_callback(self._wake)
        else:
            self._join(job)

    def _arrive(self, job: Job, reading: "Future[LoadedLoRA]") -> None:
        """Let an answer join whose LoRA has been read, or end it if that could not be."""
        assert self.adapters is not None
        try:
            if job.row.lora not in self.adapters.pool.loaded:
                self.adapters.add(reading.result(), job.row.lora)
            self._join(job)
        except Exception as error:
            print(f"an answer has ended: {error}", file=sys.stderr, flush=True)
            job.emit(Piece("the model's file cannot be read any more; ask again", job.tokens, finish="error"))

    def _join(self, job: Job) -> None:
        self.jobs[job.row] = job
        self.batch.join(job.row)

    def loras_in_use(self) -> set[int]:
        """Return the numbers of the LoRAs of all rows in the batch."""
        return {row.lora for row in self.batch.rows}

    def _take(self, job: Job, token: int) -> None:
        job.take(token)
        if not job.row.remaining:
            self.mean_seconds += 0.1 * (time.monotonic() - job.submitted - self.mean_seconds)
            with self.changed:
                del self.jobs[job.row]

    def _fail(self) -> None:
        """End all that are being continued, for what has failed may have failed for each."""
        with self.changed:
            failed, self.jobs = self.jobs, {}
            self.batch = self.new_batch()
        for job in failed.values():
            job.emit(Piece("", job.tokens, finish="error"))


def settle(future: "Future[Any]", function: Callable[[], Any]) -> None:
    """Have a future hold what a function returns or raises, unless who waits for it has gone."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
