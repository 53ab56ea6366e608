"""The columns of metrics.csv."""

COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes")
