"""Base of the stages: optimizer, learning rate, noise, checks of data, and export of trained weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from dalle_zoo.files import read_json
from dalle_zoo.model_folder import CONFIG, WEIGHTS
from dalle_zoo.networks import save_network
from dalle_zoo.registry import Registry
from dalle_zoo.sampling.noise import derive_seed
from dalle_zoo.training.data_modules import CaptionedDataModule, ImageDataModule
from dalle_zoo.training.layer_tokens import LayerTokens
from dalle_zoo.training.muon import MuonConfig
from dalle_zoo.training.optimizer import AdamWConfig, decayed_names, make_optimizer
from dalle_zoo.training.samples import Samples
from dalle_zoo.training.schedules import LearningRate, LearningRateScheduler
from dalle_zoo.training.strategies.states import DROPPED, EXCHANGE
from dalle_zoo.training.strategy_hooks import hooks_of
from dalle_zoo.weights import load_weights
from dalle_zoo.zoo import find_component

log = logging.getLogger(__name__)

N = TypeVar("N", bound=nn.Module)

FINGERPRINTS = "fingerprints"
"""Key of the fingerprints of data and tokenizers in a checkpoint."""
COVERED = 0.8
"""Share of a schedule that a run must cover, or it warns."""

_DEFERRED: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Builds stages inside the context without weights; training initializes only the shard of each process.

    A network that does not fit into one process must be built this way.
    """
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def build(make: Callable[[], N]) -> N:
    """Builds a network; without weights inside `deferred_weights`."""
    with torch.device("meta") if _DEFERRED.get() else nullcontext():
        return make()


def weights_digest(net: nn.Module) -> str:
    """Returns the hexadecimal SHA-256 of the names and weights of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class StageModule(LightningModule):
    """Base of the LightningModules.

    A subclass sets ``stage``, ``self.net`` and implements ``training_step`` and ``validation_step``.

    Args:
        net: Network that is trained.
        adamw: Optimizer settings.
        learning_rate: Learning-rate schedule.
        seed: Seed of the noise; with the step and the rank, it determines every random number of the stage.
        muon: Settings of Muon for the matrices of the residual blocks. Defaults to AdamW for all parameters.
    """

    stage: str
    """Name of the stage in `STAGES`, and of its folder in a model."""
    config_class: type
    """Dataclass of the network's architecture: the constructor's ``config``."""
    data_classes: tuple[type[CaptionedDataModule], ...] = (ImageDataModule,)
    """Data modules that the stage can be trained on."""
    entries: Sequence[str] = ("forward",)
    """Methods of the network that training calls; sharded strategies gather weights around them."""

    generates_from_captions: bool = False
    """Whether `sample_images` needs only the captions of a batch."""

    def __init__(
        self,
        net: nn.Module,
        adamw: AdamWConfig,
        learning_rate: LearningRate,
        seed: int,
        muon: MuonConfig | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.muon = muon
        self.hidden = self.hidden_matrices() if muon is not None else frozenset[str]()
        self.decayed = decayed_names(net)  # before a strategy changes the shapes of parameters
        self.adamw = adamw
        self.learning_rate = learning_rate
        self.seed = seed
        self._losses: list[Tensor] = []  # of the batches of the next step, for the plateau rule
        self._restored_steps = 0
        self._layer_tokens: LayerTokens | None = None
        self._weights: Path | None = None  # of the model that training starts from
        self._sharded = False
        self._fingerprints: dict[str, str] | None = None
        self.trained = False  # whether the trainer has made any step

    def start_from(self, location: str | None) -> None:
        """Loads the weights of a model, given by name or folder; None keeps fresh weights."""
        if location is not None:
            folder = find_component(location, self.stage)
            kind, expected = read_json(folder / CONFIG).get("type", self.stage), self.architecture().get("type")
            if kind != (expected or self.stage):
                raise ValueError(
                    f"init_from {location!r} must have weights of type {expected or self.stage!r}, got {kind!r}"
                )
            self._weights = folder / WEIGHTS
            if not _DEFERRED.get():
                load_weights(self.net, self._weights)

    @property
    def deferred(self) -> bool:
        """Whether the network has no weights yet, since it was built inside `deferred_weights`."""
        return any(parameter.is_meta for parameter in self.net.parameters())

    def configure_model(self) -> None:
        """Shards the network if the strategy shards, and initializes deferred weights; called by Lightning."""
        deferred, strategy = self.deferred, hooks_of(self.trainer.strategy)
        units = self.sharding_units() if strategy.needs_units else []
        if strategy.shards and not self._sharded:
            strategy.shard(self.net, units, self.entries)
            self._sharded = True
        elif deferred:
            self.net.to_empty(device="cpu")
            self.net.reset_parameters()  # type: ignore[operator]
        if deferred and self._weights is not None:
            load_weights(self.net, self._weights)

    def sharding_units(self) -> list[nn.Module]:
        """Modules of the network that a sharded strategy gathers one at a time, in the order of their use.

        Raises:
            ValueError: The stage has no sharding units, since it is small enough for every device.
        """
        raise ValueError(
            f"{type(self).__name__} has no residual blocks to shard or to compress: use strategy ddp; the other "
            "strategies are for the prior"
        )

    def hidden_matrices(self) -> frozenset[str]:
        """Names of the matrices that Muon updates, those of the residual blocks.

        Raises:
            ValueError: The stage has none.
        """
        raise ValueError(f"{type(self).__name__} has no residual blocks of matrices: leave model.muon out")

    def other_parameters(self) -> list[nn.Parameter]:
        """Parameters outside the network that are trained with it."""
        return []

    def on_train_start(self) -> None:
        """Records that training has begun; it does not begin in a finished run."""
        self.trained = True

    @property
    def missing_for_samples(self) -> str:
        """What to set so that `sample_images` returns images; empty if it does. Defaults to none: never images."""
        return ""

    @property
    def has_sample_images(self) -> bool:
        """Whether `sample_images` returns images without an unsharded network."""
        return False

    def network_of(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Builds the unsharded network with given weights, for a stage that can be sharded."""
        raise NotImplementedError(f"{type(self).__name__} is never sharded")

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the weights have been trained for, also when the trainer does not train."""
        return max(self.global_step, self._restored_steps)

    def setup(self, stage: str) -> None:
        """Checks the data on every rank, before training begins; Lightning calls it after the data module's setup."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.complete_data(data)
            self.check_data(data)
            if self._layer_tokens is not None and isinstance(data, ImageDataModule) and data.layers:
                self._layer_tokens.prepare(data.sprites, self.trainer.strategy.root_device)

    @property
    def image_size(self) -> int | None:
        """Side of the images that the network takes, pixels; None if it takes any or none."""
        return None

    @property
    def grid_size(self) -> int | None:
        """Image tokens in a row of the network; None if it has none."""
        return None

    def complete_data(self, data: LightningDataModule) -> None:
        """Gives data what the recipe leaves out, before their ``setup``.

        Args:
            data: Data module. External ones stay as they are.
        """
        if isinstance(data, ImageDataModule):
            data.image_size = data.image_size or self.image_size
            data.grid_size = self.grid_size

    def check_data(self, data: LightningDataModule) -> None:
        """Raises `ValueError` for data that the network cannot be trained on.

        Args:
            data: Data module whose ``setup`` has been called. External ones are accepted as they are.
        """
        if isinstance(data, CaptionedDataModule) and not isinstance(data, self.data_classes):
            names = " or ".join(cls.__name__ for cls in self.data_classes)
            raise ValueError(
                f"the {self.stage} cannot be trained on {type(data).__name__}: set data.class_path to {names}"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with two groups, or Muon and AdamW, and the learning-rate schedule, once per step."""
        if self.muon is not None and self._sharded:
            raise ValueError("Muon needs complete matrices: use strategy ddp or ddp_powersgd, or leave model.muon out")
        optimizer = make_optimizer(
            self.net,
            self.adamw,
            self.learning_rate.peak,
            self.decayed,
            self.muon,
            self.hidden,
            self.other_parameters(),
        )
        scheduler = LearningRateScheduler(optimizer, self.learning_rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1},
        }

    def log_settings(self, values: Mapping[str, float]) -> None:
        """Logs numbers of the host, which Lightning would copy to the device, where each copy waits for the step."""
        self.log_dict({name: torch.tensor(value) for name, value in values.items()})

    def observe_loss(self, loss: Tensor) -> None:
        """Records the loss of a training batch for the plateau rule."""
        if self.learning_rate.decay == "plateau":
            self._losses.append(loss.detach())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Completes the gradients, logs their norm before clipping, and passes the loss to the plateau rule."""
        self.log_settings({"schedule/learning_rate": optimizer.param_groups[0]["lr"]})
        finite = getattr(self.trainer.precision_plugin, "finite", None)
        strategy = hooks_of(self.trainer.strategy)
        self.log_settings(strategy.before_step(finite))
        if self.trainer._logger_connector.should_update_logs:
            self.log("train/gradient_norm", strategy.gradient_norm(self))
        scheduler = self.lr_schedulers()
        if not self._losses or not isinstance(scheduler, LearningRateScheduler):
            return
        # Averaged over all processes, so that they halve the rate together and share one checkpoint.
        everywhere = float(self.trainer.strategy.reduce(torch.stack(self._losses).mean()))
        self._losses.clear()
        mean = scheduler.window_mean(everywhere)
        if mean is not None:
            scheduler.observe(mean)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients, by their norm over all shards."""
        strategy = hooks_of(self.trainer.strategy)
        strategy.clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def noise_generator(self, batch_index: int) -> torch.Generator:
        """Generator of a batch's noise, a pure function of (seed, step, batch, rank), so that resuming is exact."""
        seed = derive_seed(self.seed, self.stage, self.global_step, batch_index, self.global_rank)
        return torch.Generator(self.device).manual_seed(seed)

    def schedule_ends(self) -> dict[str, int]:
        """Steps at which schedules end, by the recipe key that sets them."""
        rate = self.learning_rate
        return {"learning_rate.decay_steps": rate.warmup_steps + rate.decay_steps} if rate.decay == "cosine" else {}

    def check_length(self, max_steps: int) -> None:
        """Warns about schedules of which a run covers only a part.

        Args:
            max_steps: Steps of the run.
        """
        late = {key: end for key, end in self.schedule_ends().items() if max_steps < COVERED * end}
        if late:
            listed = ", ".join(f"model.{key} (step {end:,})" for key, end in late.items())
            rank_zero_only(log.warning)(
                "trainer.max_steps %s is shorter than the schedules %s: set them to the length of the run, if this is "
                "all of it",
                f"{max_steps:,}",
                listed,
            )

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what the stage reads besides the data, by the recipe key that names it. Defaults to none."""
        return {}

    def collect_fingerprints(self, data: LightningDataModule | None) -> dict[str, str]:
        """SHA-256 of the data and of what else the stage reads, computed once."""
        if self._fingerprints is None:
            of_data = data.fingerprints() if isinstance(data, CaptionedDataModule) else {}
            self._fingerprints = {**of_data, **self.fingerprints()}
        return self._fingerprints

    def _all_fingerprints(self) -> dict[str, str]:
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        return self.collect_fingerprints(data)

    def _check_fingerprints(self, checkpoint: dict[str, Any]) -> None:
        """Raises `ValueError` if a run would continue with other data than it began with."""
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        before, now = checkpoint.get(FINGERPRINTS), self._all_fingerprints()
        if before is None:
            log.warning("the checkpoint has no fingerprints of its data, so that changed data are not noticed")
            return
        changed = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
        if changed:
            raise ValueError(
                f"{' and '.join(changed)} changed since the checkpoint was saved: restore the original files to "
                "resume, or use --run FOLDER for a new run"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the stage and the architecture as plain data, so that consolidation needs no recipe."""
        checkpoint["dalle_zoo"] = {"stage": self.stage, "config": self.architecture()}
        checkpoint[FINGERPRINTS] = self._all_fingerprints()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects the checkpoint of another network."""
        own = {"stage": self.stage, "config": self.architecture()}
        if checkpoint.get("dalle_zoo", own) != own:
            raise ValueError(f"the checkpoint is of another network: expected {own}, got {checkpoint['dalle_zoo']}")
        self._check_fingerprints(checkpoint)
        self._restored_steps = checkpoint["global_step"]
        if checkpoint.get(EXCHANGE):  # a strategy that can use it has removed it
            log.warning(DROPPED)

    @classmethod
    def num_parameters(cls, config: Any) -> int:
        """Number of parameters of the network, without allocating it. Defaults to 0: the stage fits any machine.

        Args:
            config: An instance of `config_class`.
        """
        del config
        return 0

    @classmethod
    def memory_needed(cls, config: Any, *, trains: bool, averages: bool) -> dict[str, int]:
        """Bytes of memory that a process needs for the unsharded network in float32, by what they store.

        Args:
            config: An instance of `config_class`.
            trains: Whether gradients and moments are in the same memory as the weights.
            averages: Whether averaged weights are, too.
        """
        copies = {"weights": 1}
        if trains:
            copies |= {"gradients": 1, "AdamW": 2}
        if averages:
            copies["average"] = 1
        return {name: 4 * count * cls.num_parameters(config) for name, count in copies.items()}

    def architecture(self) -> dict[str, Any]:
        """Architecture of the network as plain data."""
        return asdict(self.net.config)  # type: ignore[call-overload, no-any-return]

    def export(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the trained weights as a component folder of a published model.

        Args:
            folder: Existing folder.
            weights: Unsharded weights of a sharded network. Defaults to those of the network.
        """
        save_network(self.net, self.stage, folder, weights=weights)

    def exports(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Callable[[Path], None]]:
        """What a finished run writes: subfolder of ``model/`` to a function that fills it.

        Args:
            weights: As for `export`.
        """
        return {self.stage: partial(self.export, weights=weights)}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Computes the metrics of validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Samples]:
        """Generates the images of a batch."""
        return self.sample_images(batch)

    def sample_images(self, batch: dict[str, Any], network: nn.Module | None = None) -> dict[str, Samples]:
        """Returns images that show the progress of training, by name. Defaults to none.

        Args:
            batch: A batch of the data module, or captions only.
            network: Unsharded network to generate with, from `network_of`. Defaults to the one that is trained.
        """
        del batch, network
        return {}


STAGES: Registry[type[StageModule]] = Registry("training stage", group="dalle_zoo.stages", base=StageModule)
"""Stages by name: each states the `config_class` of its network and the `data_classes` it can be trained on."""
