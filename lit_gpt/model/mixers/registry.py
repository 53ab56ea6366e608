"""The token mixers besides attention, by their names in Config."""

from collections.abc import Callable

from lit_gpt.model.config import Config
from lit_gpt.model.mixers.delta_net import GatedDeltaNet
from lit_gpt.model.mixers.latent import LatentAttention
from lit_gpt.model.mixers.mamba import Mamba
from lit_gpt.model.mixers.mamba2 import Mamba2
from lit_gpt.model.mixers.mixer import Mixer
from lit_gpt.model.mixers.short_conv import ShortConvolution

MIXERS: dict[str, Callable[[Config], Mixer]] = {
    "gated_delta_net": GatedDeltaNet,
    "latent_attention": LatentAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "short_conv": ShortConvolution,
}
