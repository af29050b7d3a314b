"""Training: LightningModules, data modules, schedules and callbacks. Lightning is imported here and in the CLI."""

# Importing the modules registers the stages. Their classes are not exported here: recipes resolve to the shortest path
# of a class, and the recipes of earlier runs have that of its module.
from dalle_zoo.training import dvae_module, prior_module, ranker_module  # noqa: F401
from dalle_zoo.training.base import STAGES, StageModule
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.schedules import Cosine, LearningRate

__all__ = ["STAGES", "AdamWConfig", "Cosine", "LearningRate", "StageModule"]
