"""Imports Lightning Fabric from its own small package, or else from the large one that holds it too.

The large one, `lightning`, imports a trainer, torchmetrics and whatever these find installed: seconds of each start for
what no run here uses.
"""

# ruff: noqa: F401 (for others to import from here)

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING or find_spec("lightning_fabric"):
    from lightning_fabric import Fabric
    from lightning_fabric.loggers import TensorBoardLogger
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning_fabric.plugins.precision import DeepSpeedPrecision
    from lightning_fabric.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException
else:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import TensorBoardLogger
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning.fabric.plugins.precision import DeepSpeedPrecision
    from lightning.fabric.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException
