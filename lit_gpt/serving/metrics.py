"""What the server counts, in Prometheus' text format."""

from collections import Counter
from dataclasses import dataclass, field

from lit_gpt.hardware import peak_memory_bytes
from lit_gpt.serving.scheduler import Scheduler


@dataclass
class Metrics:
    """Counts since the start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and status
    prompt_tokens: int = 0
    kept_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: float = 0.0  # together
    first_tokens: int = 0

    def text(self, scheduler: Scheduler) -> str:
        """Return them with what holds at this moment."""
        lines = ["# HELP lit_gpt_requests_total Requests by route and status.", "# TYPE lit_gpt_requests_total counter"]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'lit_gpt_requests_total{{route="{route}",status="{status}"}} {count}')
        loras = scheduler.adapters
        for name, kind, text, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("kept_tokens_total", "counter", "Tokens of prompts that were kept from others.", self.kept_tokens),
            ("generated_tokens_total", "counter", "Tokens of answers.", self.generated_tokens),
            ("answers_active", "gauge", "Answers that are continued.", len(scheduler.jobs)),
            ("answers_waiting", "gauge", "Answers that wait for a place.", len(scheduler.queue)),
            ("answers_most", "gauge", "Answers that can be continued together.", scheduler.slots),
            ("cache_bytes", "gauge", "Memory planned for keys and values.", scheduler.cache_bytes),
            ("loras", "gauge", "LoRAs in memory.", len(loras.pool.loaded) if loras else 0),
            ("lora_bytes", "gauge", "Memory that they take.", loras.pool.nbytes if loras else 0),
            ("lora_reads_total", "counter", "How often a LoRA was read from its file.", loras.reads if loras else 0),
            ("peak_memory_bytes", "gauge", "The most memory held at once.", peak_memory_bytes()),
        ):
            lines += [f"# HELP lit_gpt_{name} {text}", f"# TYPE lit_gpt_{name} {kind}", f"lit_gpt_{name} {value}"]
        name = "lit_gpt_first_token_seconds"
        lines += [f"# HELP {name} From a request to the first text.", f"# TYPE {name} summary"]
        lines += [f"{name}_sum {self.first_token_seconds:.6f}", f"{name}_count {self.first_tokens}"]
        return "\n".join(lines) + "\n"
