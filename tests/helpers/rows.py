"""Write rows of training data."""

import json
from pathlib import Path

ROWS = [
    {"instruction": f"describe the cat {i}", "input": "a dog" * (i % 2), "output": f"the task {i}"} for i in range(20)
]


def write_rows(path: Path, rows=ROWS) -> Path:
    """Write rows to a JSONL file, and return its path."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
