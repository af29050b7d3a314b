"""Training: LightningModules, data modules, schedules and callbacks. Lightning is imported here and in the CLI."""

from dalle_zoo.training.base import STAGES, StageModule
from dalle_zoo.training.data_modules import CodeDataModule, ImageDataModule
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.ranker_module import RankerModule
from dalle_zoo.training.schedules import Cosine, LearningRate

__all__ = [
    "STAGES",
    "AdamWConfig",
    "CodeDataModule",
    "Cosine",
    "DVAEModule",
    "ImageDataModule",
    "LearningRate",
    "PriorModule",
    "RankerModule",
    "StageModule",
]
