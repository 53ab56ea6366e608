"""Starts the server, and ends it by SIGTERM: what was accepted is answered first."""

import asyncio
import socket
import sys
import threading
from concurrent.futures import CancelledError
from itertools import islice
from types import FrameType

import uvicorn

from lit_gpt.distributed.placement import devices_of
from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation.steps import FastStep
from lit_gpt.hardware import device_memory
from lit_gpt.serving.app import App
from lit_gpt.serving.args import ServeArgs
from lit_gpt.serving.catalog import Catalog
from lit_gpt.serving.completions import Completions
from lit_gpt.serving.scheduler import Scheduler

WATCH_SECONDS = 2


def serve(catalog: Catalog, args: ServeArgs, key: str | None, compile: bool = False) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UsageError: the port cannot be had, or the caches would not fit the device.
        UserError: at the end, if requests were cut short by the limit of `drain_seconds`.
    """
    with listen(args.host, args.port) as listening:
        completions = start(catalog, args, compile)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        names = ", ".join(islice(catalog.served, 10))
        names += f" and {len(catalog.served) - 10} more" if len(catalog.served) > 10 else ""
        print(f"serving {names} at {url}; SIGTERM or Ctrl-C ends it", file=sys.stderr, flush=True)
        server = Server(config(completions, key, args.drain_seconds))
        asyncio.run(server.serve(sockets=[listening]))
        completions.scheduler.close()
    if completions.cut_short:
        raise UserError(f"{completions.cut_short} requests were cut short after --drain_seconds {args.drain_seconds}")


def start(catalog: Catalog, args: ServeArgs, compile: bool = False) -> Completions:
    """Take the memory for the caches, and start the thread that answers.

    Raises:
        UsageError: the device does not have that much memory.
    """
    model, context = catalog.model, args.context_of(catalog.model.config.block_size)
    told, size = plan(catalog, args, context)
    if size > sum(map(device_memory, devices_of(model))):
        raise UsageError(f"--batch_size {args.batch_size}: {told}, more than there is; lower it, or --context")
    print(told, file=sys.stderr)
    cache, adapters = model.kv_cache(args.batch_size, context), catalog.adapters
    kept = model.kv_cache(args.prefixes, context) if args.prefixes else None
    scheduler = Scheduler(model, cache, kept, FastStep(model, compile), catalog.choose, args.max_queue, adapters)
    catalog.at_rest = lambda function: scheduler.between_turns(function).result()
    if adapters:
        adapters.in_use = scheduler.loras_in_use
    if catalog.folder:
        threading.Thread(target=watch, args=(catalog, scheduler), name="watching", daemon=True).start()
    return Completions(catalog, scheduler, context, args.max_body, args.log_prompts)


def watch(catalog: Catalog, scheduler: Scheduler) -> None:
    """Serve what is in the folder of LoRAs at each time, as long as the scheduler lives."""
    told = None
    while scheduler.thread.is_alive():
        scheduler.thread.join(WATCH_SECONDS)
        try:
            catalog.scan()
        except UserError as error:
            if str(error) != told:
                print(told := str(error), file=sys.stderr, flush=True)
        except CancelledError:  # the scheduler has ended meanwhile
            return


def plan(catalog: Catalog, args: ServeArgs, context: int) -> tuple[str, int]:
    """Return what the caches are for, in words, and how many bytes they take."""
    size = sum(layer.nbytes for layer in catalog.model.kv_cache(args.batch_size + args.prefixes, context, "meta"))
    told = f"{args.batch_size} answers and {args.prefixes} kept prefixes of {context} tokens take {size / 1e9:.2f} GB"
    told += " for keys and values"
    if catalog.adapters and len(catalog.served) > 1 or catalog.folder:
        return f"{told}, LoRAs up to {args.lora_bytes / 1e9:.2f} GB", size + args.lora_bytes
    return told, size


def config(completions: Completions, key: str | None, drain_seconds: int) -> uvicorn.Config:
    """Return how uvicorn is to run the application."""
    return uvicorn.Config(
        App(completions, key).starlette(), http="h11", ws="none", lifespan="off", loop="asyncio", log_level="error",
        access_log=False, server_header=False, timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip


class Server(uvicorn.Server):
    """Ends by a signal without raising it again, so that the process ends as any other that is done.

    A second signal ends it at once.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before the model takes its time."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {host} --port {port}: cannot be listened on ({reason}); choose another") from None
