"""Compile the kernels of decoding for GPUs that are not there; see helpers/ahead_of_time.py, whose lines it prints."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.ahead_of_time import distinct, report
from lit_gpt.kernels.cuda.decoding import attention, rows
from lit_gpt.kernels.cuda.decoding.attention import Heads
from lit_gpt.kernels.cuda.dequantize import QuantizedWeight, dequantize
from lit_gpt.kernels.cuda.gemv import Epilogue, InputNorm, gemv
from lit_gpt.kernels.cuda.launch import Launch, recorded
from lit_gpt.quantization.formats import FORMATS

FALCON, LLAMA, GEMMA = (71, 1, 64), (32, 8, 128), (8, 4, 256)  # heads, groups, size


def quantized(name: str, n: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    layout = FORMATS[name].layout(n, columns)
    tensors = {key: torch.empty(shape, dtype=kept or dtype) for key, (shape, kept) in layout.items()}
    return FORMATS[name].for_cuda(tensors, columns)


def products(dtype: torch.dtype) -> None:
    """Launch products of one row and of several, plain and with all that follows them, with each kind of weight."""
    for n, columns, gated in ((4544, 18176, False), (4672, 4544, False), (2 * 11008, 4096, True), (576, 1536, False)):
        outputs = n // 2 if gated else n
        for m in (1, 8, 32):
            x, y, norm = torch.empty(m, columns), torch.empty(m, outputs), None
            if gated or n == 4672:
                norm = InputNorm(torch.empty(columns), 1e-5)
            for weight in (torch.empty(n, columns, dtype=dtype), *(quantized(f, n, columns, dtype) for f in FORMATS)):
                gemv(x, weight, Epilogue(None, "gelu_tanh" if gated else None, gated), y, dtype, norm)
                if m == 1:
                    bias = torch.empty(n, dtype=dtype)
                    for before in (norm, None):
                        gemv(x, weight, Epilogue(bias, None, gated, y, 0.5), y, dtype, before)


def of_decoding(dtype: torch.dtype) -> list[Launch]:
    """Return the launches of every kernel of decoding with a 7B's shapes."""
    with FakeTensorMode(), recorded() as launches:
        products(dtype)
        for name in FORMATS:
            for columns in (4544, 4500):
                dequantize(quantized(name, 4672, columns, dtype), dtype)

        def integers(n: int) -> Tensor:
            return torch.empty(n, dtype=torch.int64)

        for n in (1, 8):
            x, y = torch.empty(n, 4544), torch.empty(n, 4672)
            for heads, groups, size in (FALCON, LLAMA, GEMMA):
                angles = torch.empty(n, size // 2), torch.empty(n, size // 2)
                qkv, found = torch.empty(n, (heads + 2 * groups) * size), torch.empty(n, heads * size)
                which = Heads(heads, groups, size, 0.1, rotation=angles), Heads(heads, groups, size, 0.1, 30.0, 512)
                for one in which:
                    place = integers(n), integers(2), integers(1), one
                    for longest in (256, 4096):
                        attention.attend(qkv, found, *place, dtype, longest)
                    prefix = torch.empty(groups, 10, size)
                    attention.attend_prefix(qkv, found, n, prefix, prefix, 10, torch.empty(heads), one)
            table = torch.empty(65024, 4544, dtype=dtype)
            rows.embed(x, integers(n), table, None, 1.0, False)
            rows.embed(x, integers(n), table.to(torch.int8), torch.empty(65024), 1.0, True)
            for size, parts, centered in ((4544, 1, True), (128, 32, False)):
                weight = torch.empty(size)
                rows.norm(n, x, 4544, x, 4544, parts, size, weight, weight, 0, 1e-5, 0.0, centered)
            low, B = torch.empty(n, 16), torch.empty(8, 4544, dtype=dtype)
            rows.lora_up(n, y, low, 8, B, 0, 4544)
            rows.row_lora_down(low, x, integers(n), 3, dtype)
            rows.row_lora_up(y, low, integers(n), 3, dtype)
            rows.exponential_noise(torch.empty(n, 65024), integers(n), integers(n))
    return distinct(launches)


if __name__ == "__main__":
    report(of_decoding)
