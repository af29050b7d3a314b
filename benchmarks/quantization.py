"""Measures the effect of quantized weights on the bundled model: loss, sampled codes, and time.

    python benchmarks/quantization.py --threads 1

The images are outside of the training set (composition:val-styles). On a CPU, 4 bits are stored as bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import Equality, Row, compare, store
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo import DallePipeline
from dalle_zoo.data import center_transform, decode_image, open_source
from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.sampling import derive_seed, gumbel, sample_codes

VARIANTS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantize": "int8"},
    "int8, sums in bfloat16": {"dtype": torch.bfloat16, "quantize": "int8"},
    "int4, sums in bfloat16": {"dtype": torch.bfloat16, "quantize": "int4"},
}
"""Options of `from_pretrained`; the default is float32."""
IMAGES, CANDIDATES = 256, 16


def held_out(pipe: DallePipeline) -> tuple[Tensor, Tensor]:
    """Returns text ids (B, T) and codes (B, h, w) of images outside of the training set."""
    samples = [
        sample for _, sample in zip(range(IMAGES), open_source("composition:val-styles").stream(), strict=False)
    ]
    size = pipe.image_size[0]
    images = torch.stack([center_transform(decode_image(sample.image), size) for sample in samples])
    codes = pipe.image_tokenizer.encode(images.to(pipe.device).float() / 255)
    return pipe.encode_text([sample.captions[0] for sample in samples]), codes


def loss_and_choices(prior: ImagePrior, text: Tensor, codes: Tensor) -> tuple[float, Tensor]:
    """Returns the loss in nats per image token, and the token sampled at every position after true codes, (B, N)."""
    logits = prior.image_logits(text, codes).float()
    loss = float(F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
    seeds = torch.tensor([derive_seed(0, number) for number in range(len(codes))], device=codes.device)
    choices = [
        (logits[:, index] + gumbel(seeds, index, logits.shape[-1])).argmax(-1) for index in range(codes[0].numel())
    ]
    return loss, torch.stack(choices, 1)


def sampling(prior: ImagePrior, text: Tensor) -> Callable[[], Tensor]:
    """Returns a function that samples candidates of one caption."""
    seeds = torch.tensor([[derive_seed(0, 0, number) for number in range(CANDIDATES)]], device=text.device)
    return lambda: sample_codes(prior, text[:1], seeds)


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description="Effect of quantized weights on the bundled model.")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with torch.inference_mode():
        exact = DallePipeline.from_pretrained("composition", device=options.device)
        text, codes = held_out(exact)
        loss, choices = loss_and_choices(exact.prior, text, codes)
        sample = sampling(exact.prior, text)
        images = sample()
        for name, arguments in VARIANTS.items():
            prior = DallePipeline.from_pretrained("composition", device=options.device, **arguments).prior
            other_loss, other_choices = loss_and_choices(prior, text, codes)
            other_sample = sampling(prior, text)
            rows.append(
                compare(
                    f"{CANDIDATES} images of the bundled model, {name}",
                    {name: other_sample, "float32": sample},
                    path=name,
                    against="float32",
                    target=None,
                    equal=(
                        Equality(
                            what=f"loss above that of float32 ({loss:.4f} nats per token)", value=other_loss - loss
                        ),
                        Equality(
                            what="share of equal codes after true codes",
                            value=float((other_choices == choices).float().mean()),
                        ),
                        Equality(
                            what="share of equal codes after own codes",
                            value=float((other_sample() == images).float().mean()),
                        ),
                    ),
                    device=options.device,
                    dtype=name.replace(", sums in", " and"),
                )
            )
    command = f"python benchmarks/quantization.py --threads {options.threads} --device {options.device}"
    print(store("quantization", command, rows, options.device))


if __name__ == "__main__":
    main()
