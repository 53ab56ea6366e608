"""The flags of the server. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from lit_gpt.cli import NonNegativeInt, PositiveInt
from lit_gpt.generation.args import context_of


@dataclass(frozen=True)
class ServeArgs:
    """Server"""

    host: str = "127.0.0.1"  # Listen on this address; any but the loopback needs an API key.
    port: NonNegativeInt = 8000  # Listen on this port (0: a free one).
    api_key_file: Path | None = None  # Ask for the key in this file (null: for that in LIT_GPT_API_KEY, if it is set).
    batch_size: PositiveInt = 8  # Continue this many answers together.
    context: PositiveInt | None = None  # Keep this many tokens of prompt and answer together (null: up to 2048).
    prefixes: NonNegativeInt = 4  # Keep this many ended answers with their prompts, for prompts that begin alike.
    lora_bytes: PositiveInt = 1_000_000_000  # Keep LoRAs of so many bytes in memory; others are read again.
    max_queue: NonNegativeInt = 64  # Let this many answers wait for a place, and refuse more for the time being.
    max_body: PositiveInt = 1_000_000  # Refuse requests of more bytes.
    drain_seconds: NonNegativeInt = 30  # After SIGTERM, go on this long with what was accepted.
    log_prompts: bool = False  # Write each request's prompt to the log.

    def context_of(self, block_size: int) -> int:
        """Return the context for a model that takes so many tokens. Raises UsageError: it is asked for more."""
        return context_of(self.context, 2048, block_size)
