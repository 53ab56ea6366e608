"""Run the server in this process, on a port of the loopback that is free."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.kernels.policy import use_policy
from lit_gpt.serving.args import ServeArgs
from lit_gpt.serving.catalog import Catalog
from lit_gpt.serving.completions import Completions
from lit_gpt.serving.server import Server, config, listen, start
from lit_gpt.text.prompt_style import PromptStyle


@dataclass
class Running:
    """A server that runs in a thread."""

    url: str
    completions: Completions

    def wait_for(self, right: Callable[[int], bool]) -> None:
        """Wait until so many answers are continued or wait, for half a minute at most."""
        deadline = time.monotonic() + 30
        while not right(self.completions.scheduler.unfinished):
            assert time.monotonic() < deadline
            time.sleep(0.001)


@contextmanager
def running(
    folder: Path,
    loras: dict[str, Path],
    key: str | None = None,
    loras_dir: Path | None = None,
    prompt_style: str = "chatml",
    **args,
) -> Iterator[Running]:
    """Serve a checkpoint and LoRAs beside it until the block ends."""
    with listen("127.0.0.1", 0) as listening:
        base = BaseCheckpoint.open(folder)
        style = PromptStyle.from_name(prompt_style, base.tokenizer)
        with use_policy(widen=False, fused=True):  # of all tests
            server = ServeArgs(**args)
            room = {"folder": loras_dir, "limit": server.lora_bytes, "rows": server.batch_size}
            completions = start(Catalog.with_loras(base, loras, style, **room), server)
        server = Server(config(completions, key, drain_seconds=5))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", completions)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            completions.scheduler.close()
