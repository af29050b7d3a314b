"""Encodes captions and images to the ids that a prior exchanges, and decodes its codes to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.call import BATCH_SIZE, as_texts, check_ids, check_image, check_mask
from dalle_zoo.loading import PretrainedModel
from dalle_zoo.regions import cells_to_sample, fit_image
from dalle_zoo.sampling import SAMPLE
from dalle_zoo.tokenizers.words import unknown_note
from dalle_zoo.values import as_integer

# P prompts, B images, T text positions, H W pixels, h w code grid


class CodecModel(PretrainedModel):
    """A model that encodes captions and images, and decodes codes; the constructor is that of `PretrainedModel`."""

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        """Encodes a prompt or a list of prompts to padded text ids, int64 (P, T), on the device of the model."""
        return self.prior.encode_captions(self.tokenizer, as_texts("prompts", prompts)).to(self.device)

    def prompt_notes(self, prompt: str) -> list[str]:
        """What a user should know of a prompt: words that the model never saw, and a text that is truncated.

        Example:
            >>> from dalle_zoo import DallePipeline
            >>> DallePipeline.from_pretrained("composition").prompt_notes("!")
            ["prompt '!' has no words: the images show anything that the model knows"]
        """
        notes = [unknown_note(prompt, self.tokenizer.words)]
        tokens, limit = len(self.tokenizer.encode(prompt)), self.prior.caption_length
        if tokens > limit:
            notes.append(f"prompt {prompt!r} has {tokens} tokens: the model uses the first {limit} only")
        return [note for note in notes if note]

    def encode_image(self, image: Image.Image | Tensor) -> Tensor:
        """Encodes an image to codes.

        Args:
            image: A PIL image, cropped at its center and resized to the model's size, or pixels in [0, 1], (3, H, W).

        Returns:
            Codes, int64 (h, w), on the CPU.

        Raises:
            TypeError: The image is neither a PIL image nor a tensor of floating-point numbers.
            ValueError: The shape of the image or its pixels do not fit the model.
        """
        return self._encode(self._pixels([image]))[0]

    def _pixels(self, images: Sequence[Image.Image | Tensor] | Tensor) -> Tensor:
        """Checks B images and converts them to pixels of the model's size, (B, 3, H, W) on the CPU."""
        size, pixels = self.image_size, []
        for image in images:
            check_image(image)
            pixels.append(fit_image(image, size) if isinstance(image, Image.Image) else image.cpu())
            if pixels[-1].shape != (3, *size):  # codes of another size would fill the wrong cells
                raise ValueError(
                    f"image must be a PIL image or have shape {(3, *size)}, got {tuple(pixels[-1].shape)}"
                )
        return torch.stack(pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encodes pixels (B, 3, H, W) to codes, int64 (B, h, w) on the CPU."""
        with torch.inference_mode():
            batches = torch.split(pixels, BATCH_SIZE)
            codes = torch.cat([self.image_tokenizer.encode(some.to(self.device)).cpu() for some in batches])
        return codes.clone()  # an ordinary tensor, which callers may change

    def kept_codes(
        self,
        image: Image.Image | Tensor,
        *,
        mask: Image.Image | Tensor | None = None,
        prime_rows: int | None = None,
    ) -> Tensor:
        """Codes of the part of an image that generation keeps.

        Args:
            image: The image, as for `encode_image`.
            mask: White where to generate; every cell of the grid that a white pixel touches is generated, see
                `cells_to_sample`. Defaults to none.
            prime_rows: Rows of the code grid to keep, from the top, if there is no mask (section 3.3; the paper keeps
                15 of 32). Defaults to half of them.

        Returns:
            Codes for `sample`, int64 (h, w), with `SAMPLE` where to sample.

        Raises:
            TypeError: The image is neither a PIL image nor a tensor of floating-point numbers.
            ValueError: The rows, a shape or pixels do not fit the model.
        """
        codes = self.encode_image(image)
        if mask is not None:
            check_mask(mask)
            codes[cells_to_sample(mask, self.image_size, (len(codes), codes.shape[1]))] = SAMPLE
            return codes
        height = len(codes)
        rows = max(height // 2, 1) if prime_rows is None else prime_rows
        codes[as_integer("prime_rows", rows, least=1, most=height, meaning=" (rows of the code grid)") :] = SAMPLE
        return codes

    def decode(self, codes: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """Decodes codes, int64 (B, h, w), to pixels in [0, 1] on the CPU, (B, 3, H, W)."""
        check_ids("codes", codes)
        batch_size = as_integer("batch_size", batch_size, least=1)
        with torch.inference_mode():
            parts = [
                self.image_tokenizer.decode(codes[start : start + batch_size].to(self.device)).cpu()
                for start in range(0, len(codes), batch_size)
            ]
        return torch.cat(parts)

    def preview(self, codes: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """Decodes codes that are not complete, such as those of a `Progress`.

        Args:
            codes: Codes, int64 (B, h, w), with `SAMPLE` at the cells that are not sampled yet.
            batch_size: Number of images decoded at once. Defaults to 64.

        Returns:
            Pixels in [0, 1] on the CPU, (B, 3, H, W), gray at the cells that are not sampled yet.
        """
        check_ids("codes", codes)
        images = self.decode(codes.clamp(min=0), batch_size)
        missing = (codes == SAMPLE).cpu().float()[:, None]
        missing = torch.nn.functional.interpolate(missing, images.shape[2:], mode="nearest")
        return torch.where(missing > 0, torch.tensor(0.5), images)
