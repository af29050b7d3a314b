"""``dalle-zoo reconstruct``: images through the image tokenizer and back."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.cli.parser import parser
from dalle_zoo.cli.sampling import MODEL_HELP, check_out, open_image
from dalle_zoo.zoo import DEFAULT_MODEL, check_location, find_component


def reconstruct(arguments: list[str]) -> None:
    """Encodes and decodes images, and shows both."""
    p = parser("reconstruct", "Encode and decode images. The output shows originals above reconstructions.")
    p.add_argument("files", nargs="+", type=Path, help="images")
    p.add_argument("--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--out", type=Path, default=Path("reconstructions.png"), help="PNG to write [reconstructions.png]")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = p.parse_args(arguments)
    check_location(options.model)
    check_out(options.out, options.overwrite)

    import torch

    from dalle_zoo.data import center_transform
    from dalle_zoo.images import image_rows, psnr, save_png
    from dalle_zoo.networks import load_image_tokenizer

    net = load_image_tokenizer(find_component(options.model, "dvae"))
    images = torch.stack([center_transform(open_image(path), net.image_size) for path in options.files]).float() / 255
    with torch.inference_mode():
        back = net.decode(net.encode(images))
    for path, value in zip(options.files, psnr(back, images).tolist(), strict=True):
        print(f"{path}: {value:.1f} dB")
    print(save_png(image_rows(images, back), options.out).resolve())
