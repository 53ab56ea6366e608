"""The columns of metrics.csv."""

COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "tokens_per_second", "peak_memory_bytes")  # of metrics.csv
