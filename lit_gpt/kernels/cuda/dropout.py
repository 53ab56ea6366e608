"""What dropout drops, by the formula of lit_gpt.kernels.dropout, within Triton kernels."""

from lit_gpt.kernels.cuda.language import jit, tl


@jit
def stays(keys, rows, inside, columns, kept):  # fmt: skip
    """Return which elements of a tile (rows, columns) stay, given int64 keys of all rows."""
    key = tl.load(keys + rows, inside, 0)[:, None]
    h = (columns // 32 * 16 + columns % 16).to(tl.uint32)[None, :] + key.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    h = h ^ (h >> 16)
    return tl.where((columns % 32 < 16)[None, :], h & 0xFFFF, h >> 16).to(tl.int32) < kept
