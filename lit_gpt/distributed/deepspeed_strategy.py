"""Lets Lightning Fabric run DeepSpeed on the CPU too, and leave alone what goes into the model."""

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from lit_gpt.distributed import deepspeed
from lit_gpt.distributed.fabric import DDPStrategy, DeepSpeedPrecision, DeepSpeedStrategy


class AsGiven(DeepSpeedPrecision):
    """Leaves weights and inputs in the dtypes that they have.

    Fabric's own would bring all weights to one dtype, frozen ones included, and refuses frozen dataclasses as inputs.
    """

    def __init__(self) -> None:
        super().__init__("32-true")  # as which DeepSpeed sets no precision of its own

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data


class ZeroStrategy(DeepSpeedStrategy):
    """Runs DeepSpeed's ZeRO on CUDA devices, or over gloo on the CPU, which DeepSpeed supports and Fabric does not."""

    def __init__(self, device: str, stage: int, offload: bool, max_grad_norm: float | None) -> None:
        os.environ["DS_ACCELERATOR"] = device  # read when DeepSpeed is imported
        config = deepspeed.config(stage, offload, max_grad_norm)
        super().__init__(precision=AsGiven(), config=config, logging_level=logging.ERROR)
        # it has not caught up with torch's names
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

    def setup_environment(self) -> None:
        """Start this rank, on the CPU too."""
        assert self.parallel_devices is not None
        if self.parallel_devices[0].type == "cpu":
            import deepspeed.ops

            # DeepSpeed tells ranks apart by the index of their device; torch takes all of the CPU's for one
            self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
            # its collectives in shared memory, which a compiler would build first; gloo has all that is needed
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            DDPStrategy.setup_environment(self)  # past DeepSpeedStrategy's, which refuses
        else:
            super().setup_environment()
