"""Makes gradients_NAME.safetensors: losses and gradients of the released training code of DALLE-pytorch and ruDALL-E.

    python -P tests/golden/gradients.py dalle_pytorch
    python -P tests/golden/gradients.py rudalle
    python -P tests/golden/gradients.py mindalle CHECKOUT

Each needs the environment of its namesake in this folder; dalle_pytorch once for each version in `DALLE_PYTORCH`. The
weights are those of the namesake. Gradients are not stored: of each tensor the norm, and of all tensors the product
with a direction, to which every tensor contributes equally.

minDALL-E was published without training code for captions. Its loss here is the cross-entropy of the logits that its
own ``forward`` returns, with the weights of the paper and without padding, so its gradients are those of its network.
"""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path(__file__).parent
uniform = runpy.run_path(str(FOLDER / "openai_dvae.py"))["uniform"]

DALLE_PYTORCH = {"0.7.3": ("mixed", "full"), "1.6.6": ("mixed", "reversible", "axial")}
"""Versions and names of cases in dalle_pytorch.py: masked and learned padding, shared, reversible, and stable."""
ROUNDING = 1e-6
"""Norms below this are 0 in exact arithmetic."""
PADDING = 1
"""Id of [PAD] in minDALL-E's small vocabulary."""


def file_of(name: str) -> Path:
    """File of the results of a code base."""
    return FOLDER / f"gradients_{name}.safetensors"


def direction(name: str, norm: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A direction in the space of one tensor; a tensor whose gradient is 0, as that of biases of keys, has none."""
    values: Tensor = uniform(name, shape)
    return values / norm if norm > ROUNDING else torch.zeros(shape)


def results(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Loss, norms of the gradients, and their product with the direction."""
    loss.backward()
    found = {"loss": loss.detach()}
    product = torch.zeros((), dtype=torch.float64)
    for name, parameter in net.named_parameters():  # parameters that are one are listed once
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = found[f"norm {name}"] = gradient.norm()
        product += (gradient.double() * direction(name, norm, tuple(gradient.shape)).double()).sum()
    return found | {"product": product}


def dalle_pytorch() -> dict[str, dict[str, Tensor]]:
    """Cases of the installed version."""
    golden = runpy.run_path(str(FOLDER / "dalle_pytorch.py"))
    golden["stubs"]()
    from dalle_pytorch import DALLE, DiscreteVAE

    version, found = importlib.metadata.version("dalle-pytorch"), {}
    for name in DALLE_PYTORCH[version]:
        options = golden["CASES"][version][name]
        net: Any = DALLE(vae=DiscreteVAE(**golden["VAE"]), **{**golden["SIZES"], **options})
        golden["fill"](net)
        net.vae.requires_grad_(False)
        text = golden["captions"](options)
        cells = (golden["VAE"]["image_size"] // 2 ** golden["VAE"]["num_layers"]) ** 2
        codes = ((uniform("codes", (len(text), cells)) + 1) / 2 * golden["VAE"]["num_tokens"]).long()
        masked = {"mask": text != 0} if version == "0.7.3" else {}
        found[f"{version} {name}"] = results(net, net(text.clone(), codes, return_loss=True, **masked))
    return found


def rudalle() -> dict[str, dict[str, Tensor]]:
    """Both versions."""
    golden = runpy.run_path(str(FOLDER / "rudalle.py"))
    for package in ("rudalle", "rudalle.dalle"):
        golden["VQGAN"]["bare_package"](package)
    found = {}
    for version in ("v2", "v3"):
        net: Any = golden["original"](version, **golden["SMALL"])
        state = net.state_dict()
        net.load_state_dict(state | golden["weights"]({name: tuple(t.shape) for name, t in state.items()}))
        text = torch.tensor([[2, 7, 39, 3, 0, 0], [2, 5, 111, 30, 17, 8]])
        codes = (uniform("codes", (2, 144)) * 24 + 24).long()
        causal = torch.tril(torch.ones(2, 1, 150, 150))
        loss, parts = net(torch.cat([text, codes], 1), causal, return_loss=True)
        found[version] = results(net, loss) | parts
    return found


def mindalle() -> dict[str, dict[str, Tensor]]:
    """The published kind of network."""
    golden = runpy.run_path(str(FOLDER / "mindalle.py"))
    golden["bare_packages"](Path(sys.argv[2]))
    stage = golden["stage2"]("published")
    net = golden["original"](stage)
    net.load_state_dict(golden["weights"](golden["layout"](stage)))
    text = ((uniform("text", (2, 12)) + 1) / 2 * golden["VOCABULARY"]).long()
    text[0, 7:] = PADDING
    codes = ((uniform("codes", (2, 16)) + 1) / 2 * 48).long()
    from dalle.utils.sampling import get_positional_encoding

    of_image, of_text = net(codes, text, get_positional_encoding(codes), get_positional_encoding(text))
    text_loss = F.cross_entropy(of_text.flatten(0, 1), text[:, 1:].flatten(), ignore_index=PADDING)
    image_loss = F.cross_entropy(of_image.flatten(0, 1), codes.flatten())
    return {"published": results(net, (text_loss + 7 * image_loss) / 8)}


def main() -> None:
    """Writes the file of a code base; results of other versions in it stay."""
    from safetensors.torch import load_file

    name = sys.argv[1]
    cases = {"dalle_pytorch": dalle_pytorch, "rudalle": rudalle, "mindalle": mindalle}[name]()
    stored = load_file(file_of(name)) if file_of(name).exists() else {}
    stored |= {f"{case}.{key}": tensor for case, found in cases.items() for key, tensor in found.items()}
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, file_of(name))


if __name__ == "__main__":
    main()
