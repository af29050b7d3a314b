"""Parameters, activations and operations of the prior, read from the network itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from dalle_zoo.adapters import LoRAConfig
from dalle_zoo.masks import Mask, layer_masks
from dalle_zoo.models.attention import Attention
from dalle_zoo.models.attention.choice import in_lines
from dalle_zoo.models.external.mindalle import MinDALLE, MinDALLEConfig
from dalle_zoo.models.external.rudalle import RuDALLE, RuDALLEConfig
from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.models.initial import shapes_only
from dalle_zoo.models.losses import LOGITS
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.residual import ResidualBlock
from dalle_zoo.planning.formats import FLOAT32, Formats
from dalle_zoo.planning.parameters import ROOT, Parameter
from dalle_zoo.planning.workload import Bytes, Flops, Layer, Workload

PlannedConfig = PriorConfig | MinDALLEConfig | RuDALLEConfig
"""Configurations of the priors whose layers are those of `Prior`."""
PLANNED: dict[type, type[Any]] = {PriorConfig: Prior, MinDALLEConfig: MinDALLE, RuDALLEConfig: RuDALLE}
"""Their networks."""


class PriorWorkload(Workload):
    """Training step of a prior with the attention back-end ``auto``.

    Layers differ only in their masks, so a network of one layer is built.

    Args:
        config: Architecture.
        tune: What is trained, as for `PriorModule`. Defaults to all weights.
        lora: Which matrices get adapters under ``lora``. Defaults to those of `LoRAConfig`.
    """

    stage = "prior"
    module = "PriorModule"
    config_class = PriorConfig
    recomputes = True
    clips_variance = True

    def __init__(self, config: PlannedConfig, tune: str | None = None, lora: LoRAConfig | None = None) -> None:
        self.config, self.tune = config, tune
        self.tokens = config.layout.length
        with shapes_only():
            net: ImagePrior = PLANNED[type(config)](replace(config, num_layers=1))
        self.blocks = net.residual_blocks()
        text_rows = config.text_vocab + (config.text_length if isinstance(config, RuDALLEConfig) else 0)
        self.heads = {
            "text_head": _head(config.width, text_rows, config.text_length),
            "image_head": _head(config.width, config.codebook_size, config.image_length),
        }
        adapted = (lora or LoRAConfig()) if tune == "lora" else None
        self.rank = adapted.rank if adapted else 0
        self.adapted = set(adapted.chosen(net).values()) if adapted else set()
        """Linear layers with adapters."""
        self.words = net.word_embeddings() if tune == "words" else None
        self.stream = self.tokens * config.width
        """Elements of the identity path of one sample."""
        masks = getattr(config, "masks", "full")
        specs = Counter(layer_masks(masks, config.num_layers) if isinstance(masks, str) else masks)
        self.masks = [(Mask.from_spec(spec, config.layout), count) for spec, count in specs.items()]
        self.parameters = self._parameters(net)
        self.counts = _counts(config, self.parameters)
        self.flops = self._flops()

    def _parameters(self, net: ImagePrior) -> tuple[Parameter, ...]:
        units = {p: block.name.rpartition(".")[2] for block in self.blocks for p in block.branch.parameters()}
        layers, found = self.config.num_layers, []
        for name, p in net.named_parameters():
            found.append(
                Parameter(
                    name=name,
                    shape=tuple(p.shape),
                    count=layers if name.startswith("layers.") else 1,
                    unit=units.get(p, ROOT),
                    autocast=p in units and "norm" not in name,
                    early=name.startswith((*self.heads, "head.")),
                    trained=self.tune is None or (self.words is not None and name in self.words),
                )
            )
        names = {module: name for name, module in net.named_modules()}
        for module in sorted(self.adapted, key=lambda module: names[module]):
            name, unit = names[module], units[module.get_parameter("weight")]
            for part, shape in (("A", (self.rank, module.in_features)), ("B", (module.out_features, self.rank))):
                found.append(
                    Parameter(name=f"{name}.lora_{part}", shape=shape, count=layers, unit=unit, autocast=True)
                )
        return tuple(found)

    def _flops(self) -> Flops:
        """Operations of linear layers, of attention over exactly the allowed pairs, and of the heads."""
        k = self.config
        branches = [self._branch(block) for block in self.blocks]
        matrices = float(k.num_layers * sum(layer.flops for branch in branches for layer in branch))
        attention = float(sum(count * mask.flops(k.num_heads, k.width // k.num_heads) for mask, count in self.masks))
        heads = float(sum(head.flops for head in self.heads.values()))
        # Recomputation stops before the last matrix of a branch, whose result the backward pass does not need.
        last = k.num_layers * sum(branch[-1].flops for branch in branches)
        adapters = float(k.num_layers * sum(self._adapter(m).flops for m in self.adapted))
        forward = {"matrices": matrices, "attention": attention, "heads": heads}
        if self.adapted:
            forward["adapters"] = adapters
        frozen = 0.0 if self.tune is None else matrices + heads
        early = heads if frozen else 2 * heads
        return Flops(forward, matrices - last + attention + adapters, early=early, frozen=frozen)

    def _adapter(self, module: nn.Linear) -> Layer:
        """The product with A: its input, which is copied in the precision of the branch, and its output."""
        inputs, outputs = module.in_features, module.out_features
        return Layer(inputs * self.tokens, self.rank * self.tokens, 2 * self.rank * (inputs + outputs) * self.tokens)

    def _branch(self, block: ResidualBlock) -> list[Layer]:
        """Linear layers of a residual branch, in the order in which they run."""
        return [Layer.of(m, self.tokens) for m in block.branch.modules() if isinstance(m, nn.Linear)]

    @cached_property
    def _masked_layers(self) -> int:
        """Layers whose mask is a matrix: causal attention needs none, and all lines share a small one."""
        return sum(count for mask, count in self.masks if not in_lines(mask) and not mask.is_causal)

    def retained(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Inputs of every block and of the last norm, and of all operations in a branch unless it is recomputed."""
        layers = self.config.num_layers
        path = (layers * len(self.blocks) + 1) * self.stream
        retained = {"activations: identity path": batch * path * formats.residual}
        if not recompute:
            branches = sum(self._branch_bytes(block, formats) for block in self.blocks)
            retained["activations: branches"] = batch * layers * branches
            # Every layer converts its boolean mask to numbers again.
            retained["activations: attention masks"] = self._masked_layers * self.tokens**2 * formats.compute
        inputs = sum(head.inputs for head in self.heads.values())
        retained["gradients of the heads' inputs"] = batch * inputs * formats.residual
        return retained

    def _branch_bytes(self, block: ResidualBlock, formats: Formats) -> float:
        """Bytes that one branch retains for one sample: inputs and outputs of the operations between linear layers."""
        branch = self._branch(block)
        linear = [module for module in block.branch.modules() if isinstance(module, nn.Linear)]
        # A product with a frozen matrix does not need its input again; its adapter does.
        trained = [self.tune is None or module in self.adapted for module in linear]
        values = sum(layer.inputs for layer, needed in zip(branch, trained, strict=True) if needed)
        values += sum(layer.outputs for layer in branch[:-1])
        for module in self.adapted.intersection(block.branch.modules()):
            adapter = self._adapter(module)
            # The first gets a float32 input from the norm. For the others, peft converts 16 bits to the float32 of A,
            # and autocast back, so that the input is retained twice.
            copied = formats.compute < FLOAT32 and module is not linear[0]
            values += adapter.outputs + (adapter.inputs if copied else 0)
        statistics = 2 * self.tokens * formats.residual  # of the norm
        if isinstance(block.branch, Attention):  # and of each head the logarithm of the softmax's sum
            statistics += self.tokens * self.config.num_heads * FLOAT32
        return values * formats.compute + statistics

    def at_loss(self, batch: int, formats: Formats) -> Bytes:
        """Tensors of the text head, which runs last, on a copy of its positions."""
        h, head = formats.head, self.heads["text_head"]
        found = {
            "outputs of the last norm": batch * (self.stream + head.inputs) * formats.residual,
            "logits, and a float32 copy": min(batch * head.outputs, LOGITS) * (h + FLOAT32),
        }
        if h < FLOAT32:  # of the weight, and of the product that is added to its gradient
            found["16-bit copies of the text head"] = 2 * self.config.text_vocab * self.config.width * h
        return found

    def in_backward(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Gradients inside a block and, if it is recomputed, its activations."""
        largest = 0.0
        for block in self.blocks:
            first, *_, last = self._branch(block)
            if isinstance(block.branch, Attention):
                # Gradients of the result and of queries, keys and values, or of those gathered for the lines.
                size = batch * (last.inputs + max(first.outputs, 4 * self.config.width * self._gathered))
                mask = self.tokens**2 * formats.compute if self._masked_layers else 0
            else:
                size, mask = batch * (first.inputs + first.outputs), 0
            recomputed = batch * self._branch_bytes(block, formats) + mask if recompute else 0
            largest = max(largest, size * formats.compute + recomputed)
        path = 2 * batch * self.stream * formats.residual
        return {"gradients inside a block" + (", and its activations" if recompute else ""): path + largest}

    @cached_property
    def _gathered(self) -> int:
        """Largest number of query and key positions that are gathered for all lines of a mask."""
        return max((mask.line_sizes.num_gathered for mask, _ in self.masks if in_lines(mask)), default=0)


def _head(width: int, rows: int, positions: int) -> Layer:
    """Sizes of a head."""
    return Layer(width * positions, rows * positions, 2 * rows * width * positions)


def _counts(config: PlannedConfig, parameters: tuple[Parameter, ...]) -> dict[str, int]:
    """Parameters of `PriorConfig.count_parameters`, with one entry for the table of text and padding tokens.

    External priors have one entry for all layers, and networks with adapters one for what is trained.
    """
    counts: dict[str, int] = {}
    if not isinstance(config, PriorConfig) or not all(p.trained for p in parameters):
        for p in parameters:
            part = p.name.partition(".")[0].replace("_", " ")
            name = f"{part}, trained" if p.trained and not all(q.trained for q in parameters) else part
            counts[name] = counts.get(name, 0) + p.total
        return counts
    for part, count in config.count_parameters().items():
        name = "text and padding tokens" if part in ("text tokens", "padding tokens") else part
        counts[name] = counts.get(name, 0) + count
    return counts
