"""Trains `prior/composition-8x8` and DALLE-pytorch 1.6.6 for the same CPU time on the same batches, and scores both.

    python benchmarks/composition.py --minutes 30

Both learn the image tokens of one tokenizer, from the captions of one tokenizer, those of the bundled model. Seconds
are of one thread, and only updates count. The network of the recipe is trained as the recipe says. DALLE-pytorch has
as many layers as come nearest to its number of parameters, its own loss, PyTorch's AdamW, and the best of three
learning rates, each tried for a fifteenth of the time. Both rates fall along a cosine. Neither averages its weights or
drops captions. Scores are those of the protocol `composition` for one image, without a ranker.

DALLE-pytorch is not among the requirements of the tests; the command that installs it is in benchmarks/updates.py. The
table between ``<!-- peer -->`` and ``<!-- end -->`` in docs/evaluate/composition.md is written from the result.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from dalle_zoo_eval.datasets.base import Item
from dalle_zoo_eval.datasets.composition import read_composition
from dalle_zoo_eval.datasets.images import load_image
from dalle_zoo_eval.extractors.sprites import load_sprites
from dalle_zoo_eval.metrics.composition import composition
from dalle_zoo_eval.sample_scores import MEASURED
from harness import cpu_name
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from updates import CONFIG, GIVEN, RECIPE, dalle_pytorch

from dalle_zoo import DallePipeline
from dalle_zoo.composition.sprites import bundled_folder
from dalle_zoo.files import atomic_write, write_json
from dalle_zoo.images import to_uint8
from dalle_zoo.sampling import SamplingOptions, sample_codes
from dalle_zoo.training.data_modules import ImageDataModule, TextConfig
from dalle_zoo.training.muon import MuonConfig
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.zoo import DEFAULT_MODEL

# B samples, T text positions, h w of the grid of image tokens, N = h w, P prompts, n images of a prompt

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "composition.json"
PAGE = ROOT / "docs" / "evaluate" / "composition.md"
DATA = RECIPE["data"]["init_args"]
RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates of DALLE-pytorch to choose from; the first is the default of its training script."""
TRIAL = 1 / 15
"""Share of the time in which each of them is tried."""
SCHEDULE = LearningRate(peak=1.0, warmup_steps=30, decay="cosine", final=0.01, decay_steps=970)
"""Factor of the learning rate, by thousandths of the time."""
GROUPS = ("plain", "ground", "hue", "count", "pair")
IMAGES = 4
"""Images of each prompt."""
SAMPLING = {"temperature": 0.4}
"""Sampling options of both; without dropped captions there is nothing to guide with."""


class Contender(Protocol):
    """A network to train."""

    name: str
    net: nn.Module
    optimizer: torch.optim.Optimizer
    rate: float

    def loss(self, text: Tensor, codes: Tensor) -> Tensor:
        """Loss that is minimized, of text ids (B, T) and image tokens (B, h, w)."""

    def image_loss(self, text: Tensor, codes: Tensor) -> Tensor:
        """Nats per image token, a scalar."""

    def sample(self, text: Tensor, seed: int) -> Tensor:
        """Image tokens of text ids (P, T): int64 (P, n, h, w)."""


class Native:
    """The network, the optimizer and the learning rate of the recipe."""

    name = "prior/composition-8x8"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rate = float(GIVEN["learning_rate"]["peak"])
        module = PriorModule(CONFIG, adamw=AdamWConfig(**GIVEN["adamw"]), muon=MuonConfig(**GIVEN["muon"]))
        self.net: Any = module.net
        made: Any = module.configure_optimizers()
        self.optimizer = made["optimizer"]
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"]

    def loss(self, text: Tensor, codes: Tensor) -> Tensor:
        total: Tensor = self.net.loss(text, codes).total
        return total

    def image_loss(self, text: Tensor, codes: Tensor) -> Tensor:
        image: Tensor = self.net.loss(text, codes).image
        return image

    def sample(self, text: Tensor, seed: int) -> Tensor:
        seeds = torch.arange(len(text) * IMAGES).view(-1, IMAGES) + seed
        return sample_codes(self.net, text, seeds, SamplingOptions(**SAMPLING))


class Peer:
    """DALLE-pytorch with about as many parameters as the network of the recipe.

    Args:
        rate: Highest learning rate.
        parameters: Number of parameters to come near to.
    """

    name = "DALLE-pytorch 1.6.6"

    def __init__(self, rate: float, parameters: int) -> None:
        torch.manual_seed(0)
        sizes = {depth: count(dalle_pytorch(depth)) for depth in range(1, CONFIG.num_layers + 1)}
        self.depth = min(sizes, key=lambda depth: abs(sizes[depth] - parameters))
        torch.manual_seed(0)
        self.net: Any = dalle_pytorch(self.depth)
        self.rate = rate
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)

    def loss(self, text: Tensor, codes: Tensor) -> Tensor:
        total: Tensor = self.net(self._ids(text), codes.flatten(1), return_loss=True)
        return total

    def image_loss(self, text: Tensor, codes: Tensor) -> Tensor:
        logits = self._image_logits(text, codes.flatten(1))
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def sample(self, text: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        many = text.repeat_interleave(IMAGES, 0)
        codes = torch.empty(len(many), 0, dtype=torch.long)
        for _ in range(CONFIG.image_length):
            logits = self._image_logits(many, codes)[:, -1] / SAMPLING["temperature"]
            codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        return codes.view(len(text), IMAGES, CONFIG.image_height, CONFIG.image_width)

    def _ids(self, text: Tensor) -> Tensor:
        """Ids with 0 for padding, which DALLE-pytorch replaces by an id for each position, as ours are."""
        return torch.where(text >= CONFIG.text_vocab, 0, text + 1)

    def _image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        logits: Tensor = self.net(self._ids(text), codes)
        return logits[:, CONFIG.text_length :, self.net.num_text_tokens :]


def count(net: nn.Module) -> int:
    """Returns the number of trained parameters."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokenizers of the bundled model, and what they make of the composed data."""

    pipe: DallePipeline
    data: ImageDataModule

    @classmethod
    def load(cls, model: str) -> Tokens:
        text = TextConfig(**{**DATA["text"], "tokenizer": model})
        data = ImageDataModule(**{**DATA, "text": text})
        data.setup("fit")
        return cls(pipe=DallePipeline.from_pretrained(model), data=data)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields text ids (B, T) and image tokens (B, h, w) of training, the same in every call."""
        while True:
            for batch in self.data.train_dataloader():
                yield batch["text"], self.encode(batch["image"])

    def of(self, items: tuple[Item, ...]) -> tuple[Tensor, Tensor]:
        """Text ids and image tokens of the items of a protocol, their images halved as in training."""
        images = torch.stack([load_image(item, "center", DATA["image_size"]) for item in items]).float() / 255
        return self.data.encode_captions([item.captions[0] for item in items]), self.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Image tokens of pixels in [0, 1], (B, 3, H, W)."""
        with torch.no_grad():
            return self.pipe.image_tokenizer.encode(images)


def train(contender: Contender, tokens: Tokens, seconds: float) -> int:
    """Trains for a CPU time; returns the number of updates."""
    spent, updates = 0.0, 0
    highest = [group["lr"] for group in contender.optimizer.param_groups]
    trained = [p for group in contender.optimizer.param_groups for p in group["params"]]
    contender.net.train()
    bar = tqdm(total=round(seconds), unit="s", desc=f"{contender.name}, learning rate {contender.rate:g}")
    for text, codes in tokens.batches():
        started = time.process_time()
        for group, rate in zip(contender.optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * SCHEDULE.at(int(1000 * spent / seconds))
        contender.optimizer.zero_grad()
        contender.loss(text, codes).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        contender.optimizer.step()
        spent += time.process_time() - started
        updates += 1
        bar.n = min(round(spent), bar.total)
        bar.refresh()
        if spent >= seconds:
            break
    bar.close()
    contender.net.eval()
    return updates


@torch.no_grad()
def bits(contender: Contender, tokens: Tokens, group: str, prompts: int) -> float:
    """Returns bits per image token of the composed images of a group."""
    text, codes = tokens.of(read_composition(None, group).items[:prompts])
    return float(contender.image_loss(text, codes)) / math.log(2)


@torch.no_grad()
def scores(contender: Contender, tokens: Tokens, group: str, prompts: int) -> dict[str, Any]:
    """Returns the scores of the protocol for one image of each prompt of a group, with intervals."""
    items = read_composition(None, group).items[:prompts]
    text = tokens.data.encode_captions([item.captions[0] for item in items])
    images = to_uint8(tokens.pipe.decode(contender.sample(text, seed=0).flatten(0, 1)))
    found = load_sprites(bundled_folder(), torch.device("cpu"))(images)
    measured = (found[name].unflatten(0, (len(items), IMAGES)) for name in MEASURED)
    return {part: value._asdict() for part, value in composition(*measured, [item.targets for item in items]).items()}


def best_rate(tokens: Tokens, parameters: int, seconds: float, prompts: int) -> tuple[float, dict[str, float]]:
    """Returns the learning rate with the fewest bits on plain prompts after a short training, and all figures."""
    tried = {}
    for rate in RATES:
        peer = Peer(rate, parameters)
        train(peer, tokens, seconds * TRIAL)
        tried[rate] = bits(peer, tokens, "plain", prompts)
    return min(tried, key=lambda rate: tried[rate]), {f"{rate:g}": value for rate, value in tried.items()}


def compare(model: str, seconds: float, prompts: int) -> dict[str, Any]:
    """Trains and scores both, and returns the result."""
    tokens = Tokens.load(model)
    native = Native()
    rate, tried = best_rate(tokens, count(native.net), seconds, prompts)
    contenders: list[Contender] = [native, Peer(rate, count(native.net))]
    systems = {}
    for contender in contenders:
        updates = train(contender, tokens, seconds)
        systems[contender.name] = {
            "parameters": count(contender.net),
            "learning_rate": contender.rate,
            "updates": updates,
            "bits_per_token": {group: bits(contender, tokens, group, prompts) for group in GROUPS},
            "scores": {group: scores(contender, tokens, group, prompts) for group in GROUPS},
        }
        print(json.dumps({contender.name: systems[contender.name]}, indent=1), flush=True)
    return {
        "model": model,
        "minutes": seconds / 60,
        "batch_size": DATA["batch_size"],
        "images_of_a_prompt": IMAGES,
        "sampling": dict(SAMPLING),
        "rates_tried": tried,
        "systems": systems,
        "config": asdict(CONFIG),
        "hardware": cpu_name(),
        "torch": torch.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result as Markdown."""
    systems = result["systems"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("parameters", lambda s: f"{s['parameters'] / 1e6:.2f} M"),
        ("updates", lambda s: f"{s['updates']:,}"),
    ]
    for group in GROUPS:
        rows.append((f"`{group}`, bits per image token", lambda s, g=group: f"{s['bits_per_token'][g]:.2f}"))
    for group in GROUPS:
        parts = next(iter(systems.values()))["scores"][group]
        for part in [name for name in parts if name != "all" or len(parts) > 2]:
            rows.append((f"`{group}`, {part}", lambda s, g=group, p=part: percent(s["scores"][g][p])))
    lines = [f"| | {' | '.join(systems)} |", f"|---|{'---|' * len(systems)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(map(show, systems.values()))} |" for name, show in rows)])


def percent(estimate: dict[str, float]) -> str:
    """Returns a share and its interval."""
    return f"{100 * estimate['value']:.0f} % ({100 * estimate['low']:.0f} to {100 * estimate['high']:.0f})"


def main() -> None:
    """Runs the comparison, stores the result and writes the table."""
    parser = argparse.ArgumentParser(description="Compares a prior of composed images with DALLE-pytorch.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"model with the tokenizers ({DEFAULT_MODEL})")
    parser.add_argument("--minutes", type=float, default=30.0, help="CPU minutes of training for each (30)")
    parser.add_argument("--prompts", type=int, default=100, help="largest number of prompts of a group (100)")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file (benchmarks/results/composition.json)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = compare(options.model, 60 * options.minutes, options.prompts)
    write_json(options.out, result)
    if options.out == RESULT:
        block = f"<!-- peer -->\n\n{table(result)}\n\n<!-- end -->"
        text = re.sub(r"<!-- peer -->.*?<!-- end -->", lambda _: block, PAGE.read_text("utf-8"), flags=re.DOTALL)
        with atomic_write(PAGE) as path:
            path.write_text(text, "utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
