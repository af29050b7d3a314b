"""Training: LightningModules, data modules, schedules and callbacks. Lightning is imported here and in the CLI."""

from dalle_zoo.training.base import StageModule
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.schedules import Cosine, LearningRate

__all__ = ["AdamWConfig", "Cosine", "LearningRate", "StageModule"]
