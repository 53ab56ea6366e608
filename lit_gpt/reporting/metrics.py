"""The columns of metrics.csv."""

COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes")
REQUIRED = tuple(name for name in COLUMNS if name != "grad_norm")  # runs of before have no grad_norm
