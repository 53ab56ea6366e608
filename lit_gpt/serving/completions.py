"""From a request to its answer: whole, or as a stream of events that ends when the client goes away."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lit_gpt.generation.engine import check_ids, new_generator
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.stopping import AnswerText
from lit_gpt.serving.catalog import Catalog, Served
from lit_gpt.serving.errors import APIError, bad
from lit_gpt.serving.metrics import Metrics
from lit_gpt.serving.replies import Reply, event
from lit_gpt.serving.requests import Asked, parse_json, read_request
from lit_gpt.serving.scheduler import Job, Piece, QueueFull, Scheduler
from lit_gpt.text.json_grammar import JSONGrammars
from lit_gpt.text.messages import Message, Tools
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Encoding, Tokenizer

Pieces = asyncio.Queue[tuple[int, Piece]]  # of a request's answers, by their index
FAILED = "the server failed at this answer; its log says why"


class Completions:
    """Answers chats, and continues texts.

    Args:
        context: tokens that prompt and answer may have together.
        max_body: bytes that a request may have.
        log_prompts: whether to write prompts to the log.
    """

    def __init__(
        self, catalog: Catalog, scheduler: Scheduler, context: int, max_body: int, log_prompts: bool = False
    ) -> None:
        self.catalog, self.scheduler, self.context = catalog, scheduler, context
        self.max_body, self.log_prompts, self.metrics = max_body, log_prompts, Metrics()
        self.cut_short = 0
        vocabulary = catalog.model.config.padded_vocab_size
        self.grammars = JSONGrammars(catalog.tokenizer, vocabulary, "response_format")
        self.tokenizing = ThreadPoolExecutor(1, "tokenizing")  # one at a time, for a long text takes memory

    async def answer(self, request: Request, chat: bool) -> Response:
        """Answer one request.

        Raises:
            APIError: it asks for what is not there, or there is no room for it now.
            UserError: the model's template refuses the messages.
        """
        start, asked = time.monotonic(), read_request(parse_json(await self.read_body(request)), chat)
        served = await self.catalog.ready(asked.model)
        self.check_number(asked)
        wanted = [asked.messages] if chat else asked.prompts
        prompts = [await self.encode(prompt, served, asked.tools) for prompt in wanted]
        pieces: Pieces = asyncio.Queue()
        jobs = self.jobs(asked, served, prompts, pieces)
        if asked.schema is not None:
            await self.hold(jobs, asked.schema)
        told, tools = asked.logprobs is not None, [tool["function"]["name"] for tool in asked.tools or ()]
        reply = Reply(self.catalog.tokenizer, served.name, chat, len(jobs), told, sum(map(len, prompts)), tools)
        self.submit(request.client.host if request.client else "", jobs)
        leave = partial(self.leave, asked, reply, jobs, start)
        followed = self.follow(reply, pieces, start)
        if asked.stream:
            return Events(stream(reply, followed, asked.include_usage), leave)
        try:
            return await whole(request, reply, followed)
        finally:
            leave()

    async def read_body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise APIError(415, "expected a body of the content type application/json")
        body, size = bytearray(), 0
        async for chunk in request.stream():  # of what is too long all is read, so that the client comes to the answer
            size += len(chunk)
            if size <= self.max_body:
                body += chunk
        if size > self.max_body:
            raise APIError(413, f"the body: expected at most {self.max_body} bytes, found {size}")
        return bytes(body)

    async def encode(self, prompt: Any, served: Served, tools: Tools = None) -> list[int]:
        """Return the token ids of a text, of ids, or of a chat up to where the answer begins."""
        style, tokenizer, model = served.read_style, self.catalog.tokenizer, self.catalog.model
        if isinstance(prompt, str):
            ids = await self.tokenized(partial(tokenizer.encode_batch, [prompt]))
        elif isinstance(prompt[0], dict):
            # rendering limits the memory of the process, which a step of the model must not meet
            rendering = self.scheduler.between_turns(partial(rendered, style, prompt, tokenizer, tools))
            ids = await self.tokenized(partial(style.encode, [await asyncio.wrap_future(rendering)], tokenizer))
        else:
            ids = prompt
            if max(ids) >= model.config.padded_vocab_size:
                raise bad("prompt", f"token ids below {model.config.padded_vocab_size}")
        if not ids:
            raise APIError(400, "the prompt holds no tokens; give it some text")
        check_ids(model, ids)
        return [*model.virtual_tokens, *ids]

    async def tokenized(self, encode: Callable[[], Iterator[Encoding]]) -> list[int]:
        """Return the ids of a text, tokenized while the loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, lambda: next(encode()).ids)

    def jobs(self, asked: Asked, served: Served, prompts: list[list[int]], pieces: Pieces) -> list[Job]:
        """Return a job for each prompt and choice, which puts its pieces into the queue."""
        loop = asyncio.get_running_loop()
        jobs: list[Job] = []
        for ids in prompts:
            room = self.context - len(ids)
            new = asked.new_tokens(room)
            if not 0 < new <= room:
                field = "messages" if asked.messages else "prompt"
                told = f"the prompt's {len(ids)} tokens and {max(new, 1)} new ones exceed the context of {self.context}"
                raise APIError(400, told, field, "context_length_exceeded")
            for choice in range(asked.n):
                # the first choice is what generate/base.py --seed gives
                generator = new_generator(self.catalog.model, (asked.seed + choice) % 2**63)
                row = DecodingRow(list(ids), new, generator, lora=served.lora, sampling=asked.sampling)
                text = AnswerText(self.catalog.tokenizer, asked.stop)
                emit = partial(emit_to, loop, pieces, len(jobs))
                jobs.append(Job(row, served.read_style.stop_ids, text, emit, asked.logprobs))
        return jobs

    async def hold(self, jobs: list[Job], schema: dict[str, Any]) -> None:
        """Have the answers be JSON of a schema. Raises APIError if they cannot be held to it."""

        def hold_all() -> None:
            for job in jobs:
                job.row.constraint = self.grammars.held_to(schema, job.stop_ids)

        try:
            await asyncio.get_running_loop().run_in_executor(self.tokenizing, hold_all)
        except ValueError as error:
            raise APIError(400, f"response_format: {error}", "response_format", "invalid_value") from None

    def check_number(self, asked: Asked) -> None:
        most, wanted = self.scheduler.most_waiting, asked.n * max(1, len(asked.prompts))
        if wanted > most:
            raise APIError(400, f"n: {wanted} answers at once; expected at most {most}", "n", "invalid_value")

    def submit(self, owner: str, jobs: list[Job]) -> None:
        try:
            self.scheduler.submit(owner, jobs)
        except QueueFull as full:
            message = "too many answers wait for a place; ask again later"
            raise APIError(429, message, code="queue_full", retry_after=full.retry_after) from None

    async def follow(self, reply: Reply, pieces: Pieces, start: float) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all answers until the last has ended.

        Raises:
            APIError: the model failed.
        """
        first = True
        while not reply.finished:
            index, piece = await pieces.get()
            if piece.finish == "error":
                raise APIError(503, piece.text, "model", "model_unavailable") if piece.text else APIError(500, FAILED)
            reply.choices[index].add(piece)
            if first:
                self.metrics.first_token_seconds += time.monotonic() - start
                self.metrics.first_tokens += 1
                first = False
            yield index, piece

    def leave(self, asked: Asked, reply: Reply, jobs: list[Job], start: float) -> None:
        """Give back the places of answers that have not ended, and count and log the request."""
        task = asyncio.current_task()
        self.cut_short += bool(task and task.cancelling())  # by the server, which ends
        self.scheduler.cancel([job for job, choice in zip(jobs, reply.choices, strict=True) if not choice.finish])
        new, seconds = sum(job.tokens for job in jobs), time.monotonic() - start
        self.metrics.prompt_tokens += reply.prompt_tokens
        self.metrics.kept_tokens += sum(job.row.cached for job in jobs)
        self.metrics.generated_tokens += new
        ended = "answered" if reply.finished else "left"
        line = (
            f"{time.strftime('%H:%M:%S')} {reply.model}: {ended}, {reply.prompt_tokens} + {new} tokens, {seconds:.2f} s"
        )
        prompt = f" {json.dumps(asked.messages or asked.prompts)}" if self.log_prompts else ""
        print(line + prompt, file=sys.stderr, flush=True)


def rendered(style: PromptStyle, messages: list[Message], tokenizer: Tokenizer, tools: Tools) -> str:
    """Return the text of a chat up to where the answer begins.

    Raises:
        APIError: the template shows no tools.
        UserError: it refuses the messages.
    """
    text = style.render(messages, tokenizer, True, tools)
    if tools and text == style.render(messages, tokenizer, True):
        raise APIError(400, f"tools: the model's prompt style '{style.name}' has no place for them", "tools")
    return text


def emit_to(loop: asyncio.AbstractEventLoop, pieces: Pieces, index: int, piece: Piece) -> None:
    """Put a piece into a request's queue, from another thread than its loop's, which may have ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))


async def whole(request: Request, reply: Reply, pieces: AsyncIterator[tuple[int, Piece]]) -> Response:
    """Return the whole reply when all answers have ended, or nothing once the client has gone."""

    async def collect() -> None:
        async for _ in pieces:
            pass

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, watching = asyncio.ensure_future(collect()), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((collecting, watching), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        await collecting
        return JSONResponse(reply.whole())
    finally:
        collecting.cancel()
        watching.cancel()


async def stream(reply: Reply, pieces: AsyncIterator[tuple[int, Piece]], include_usage: bool) -> AsyncIterator[str]:
    """Yield the events of a reply."""
    for index in range(len(reply.choices) if reply.chat else 0):
        yield reply.opening(index)
    try:
        async for index, piece in pieces:
            if told := reply.event(index, piece):
                yield told
    except APIError as error:
        yield event(error.body())
    else:
        yield reply.closing(include_usage)


class Events(StreamingResponse):
    """Server-sent events. `leave` is called at their end, or once the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, contents: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(contents, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()
