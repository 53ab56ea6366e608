"""Which instructions of the processor a benchmark and its contestants may use."""

import os

FLAGS = {
    "native": {},
    # what a laptop without AVX-512 has: oneDNN's, ATen's, MKL's and our own kernels' limits
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "LIT_GPT_MARCH": "haswell",
    },
}  # fmt: skip


def limit(isa: str) -> None:
    """Limit this process and those it starts; to be called before torch is imported."""
    os.environ.update(FLAGS[isa])


def suffix(isa: str) -> str:
    """Return what tells apart the names of results' files."""
    return "" if isa == "native" else f"_{isa}"
