"""Prompt in, images out: shapes, seeds, ranking, priming, and a model folder that comes back."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle_zoo import DallePipeline
from dalle_zoo.files import FileError
from dalle_zoo.images import from_pil, to_uint8
from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.models.dvae import DVAE, DVAEConfig, DVAEEncoder, DVAEEncoderConfig
from dalle_zoo.models.prior import Prior
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.pipeline import PipelineOutput, load_model
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.sampling import SAMPLE, Progress, SamplingOptions
from dalle_zoo.tokenizers import ByteTokenizer

Maker = Callable[..., Prior]

HEIGHT, WIDTH = 12, 16  # pixels: 3 x 4 codes of 4 pixels
ROUNDING = 1e-6
"""A convolution may sum up another batch in another order."""


class Brightness(nn.Module):
    """A ranker that likes bright images, and knows which captions it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        assert len(images) == len(captions)
        self.asked += captions
        return images.mean((1, 2, 3))


@pytest.fixture
def make_pipe(random_prior: Maker) -> Callable[..., DallePipeline]:
    def make(ranker: Any = None, **changes: Any) -> DallePipeline:
        torch.manual_seed(0)
        dvae = DVAE(DVAEConfig(image_size=12, width=4, num_groups=3, decoder_stem=4, codebook_size=7))
        nn.init.normal_(dvae.decoder.input.weight)  # stands for training: codes that look different
        prior = random_prior(**({"text_vocab": 256, "text_length": 6} | changes))
        return DallePipeline(dvae, prior, ByteTokenizer(), ranker)

    return make


@pytest.fixture
def pipe(make_pipe: Callable[..., DallePipeline]) -> DallePipeline:
    return make_pipe(Brightness())


def test_an_image_tokenizer_without_a_decoder_is_refused(random_prior: Maker) -> None:
    encoder = DVAEEncoder(DVAEEncoderConfig(image_size=12, width=4, num_groups=3, codebook_size=7))
    with pytest.raises(ValueError, match=r"\(DVAEEncoder\) has no decoder, so no image can be generated"):
        DallePipeline(encoder, random_prior(text_vocab=256, text_length=6), ByteTokenizer())


# ------------------------------------------------------------ outputs


@pytest.mark.parametrize(("prompt", "count", "total"), [("ab", 1, 1), ("ab", 3, 3), (["ab", "", "abc"], 2, 6)])
def test_what_comes_out(pipe: DallePipeline, prompt: Any, count: int, total: int) -> None:
    def call(output_type: str) -> Any:
        return pipe(prompt, num_images_per_prompt=count, seed=1, output_type=output_type).images

    codes, pixels, array, images = call("latent"), call("pt"), call("np"), call("pil")
    assert codes.dtype == torch.int64
    assert codes.shape == (total, 3, 4)
    assert pixels.shape == (total, 3, HEIGHT, WIDTH)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    torch.testing.assert_close(pixels, pipe.decode(codes))
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, pixels.permute(0, 2, 3, 1).numpy())
    assert [(image.mode, image.size) for image in images] == [("RGB", (WIDTH, HEIGHT))] * total
    assert torch.equal(to_uint8(from_pil(images[-1])), to_uint8(pixels[-1]))


def test_the_output_and_its_tuple(pipe: DallePipeline) -> None:
    out = pipe("ab", num_images_per_prompt=2, seed=1, output_type="latent")
    assert isinstance(out, PipelineOutput)
    assert out.scores is None
    assert out.seeds is not None
    assert out.seeds.shape == (2,)
    plain = pipe("ab", num_images_per_prompt=2, seed=1, output_type="latent", return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1
    assert torch.equal(plain[0], out.images)


def test_prompts_do_matter(pipe: DallePipeline) -> None:
    one, other = (pipe(p, num_images_per_prompt=8, seed=1, output_type="latent").images for p in ("ab", "zz"))
    assert not torch.equal(one, other)


def test_sampling_options_reach_the_samples(pipe: DallePipeline) -> None:
    def generate(**options: Any) -> Tensor:
        images: Tensor = pipe("ab", num_images_per_prompt=6, seed=1, output_type="latent", **options).images
        return images

    for option in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert len(generate(**option).unique(dim=0)) == 1, option
    assert len(generate().unique(dim=0)) == 6
    assert not torch.equal(generate(guidance_scale=3.0), generate())


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_sample_gives_the_codes_of_a_call(pipe: DallePipeline, batch_size: int) -> None:
    options = SamplingOptions(temperature=0.8, top_k=5, top_p=0.9, guidance_scale=1.5)
    out = pipe(PROMPTS, num_images_per_prompt=3, seed=1, output_type="latent", **asdict(options))
    text, seeds = pipe.encode_text(PROMPTS), out.seeds.view(3, 3)
    codes = pipe.sample(text, seeds, options, batch_size=batch_size)
    assert torch.equal(codes.flatten(0, 1), out.images)
    assert torch.equal(pipe.sample(text[1:2], seeds[1:2, 2:], options)[0, 0], codes[1, 2])
    assert not torch.equal(pipe.sample(text, seeds), codes), "without options it is plain sampling"


def test_sample_refuses_what_does_not_fit(pipe: DallePipeline) -> None:
    text, seeds = pipe.encode_text(PROMPTS), torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        pipe.sample(text, seeds, batch_size=0)
    with pytest.raises(ValueError, match=r"seeds must have shape \(3, N\), one row per prompt, got \(2, 2\)"):
        pipe.sample(text, seeds[:2])


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_windows_sample_the_same_in_fewer_passes(pipe: DallePipeline, batch_size: int) -> None:
    def generate(**options: Any) -> Tensor:
        common = {"num_images_per_prompt": 3, "seed": 1, "temperature": 0.5, "output_type": "latent"}
        images: Tensor = pipe(["ab", "b"], **common, **options).images
        return images

    calls: list[tuple[int, int]] = []
    windows = generate(window=4, batch_size=batch_size, callback=lambda it: calls.append((it.done, it.total)))
    assert torch.equal(windows, generate())
    jobs = 6 if batch_size == 1 else 2
    assert calls[-1] == (12 * jobs, 12 * jobs)
    assert len(calls) < 12 * jobs


# ------------------------------------------------------------ seeds


PROMPTS = ["ab", "b", "c"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 8, 64])
def test_the_batch_size_changes_nothing(pipe: DallePipeline, batch_size: int) -> None:
    def generate(batch_size: int, **options: Any) -> Any:
        return pipe(PROMPTS, num_images_per_prompt=4, seed=5, batch_size=batch_size, **options)

    together = generate(100, output_type="pt", rerank=2)
    apart = generate(batch_size, output_type="pt", rerank=2)
    assert torch.equal(apart.seeds, together.seeds)
    torch.testing.assert_close(apart.images, together.images, atol=ROUNDING, rtol=0)
    assert torch.equal(generate(batch_size, output_type="latent").images, generate(100, output_type="latent").images)


def generate(pipe: DallePipeline, count: int = 3, **options: Any) -> Tensor:
    images: Tensor = pipe(PROMPTS, num_images_per_prompt=count, output_type="latent", **options).images
    return images


def test_seeds_and_generators(pipe: DallePipeline) -> None:
    assert torch.equal(generate(pipe, seed=1), generate(pipe, seed=1))
    assert not torch.equal(generate(pipe, seed=1), generate(pipe, seed=2))
    # More candidates leave the first ones as they were.
    assert torch.equal(generate(pipe, 5, seed=1).unflatten(0, (3, 5))[:, :3].flatten(0, 1), generate(pipe, seed=1))

    one = torch.Generator().manual_seed(7)
    first, second = generate(pipe, generator=one), generate(pipe, generator=one)
    assert not torch.equal(first, second), "a generator moves on"
    assert torch.equal(generate(pipe, generator=torch.Generator().manual_seed(7)), first)


def test_a_generator_for_each_image(pipe: DallePipeline) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(100 + index) for index in range(9)]

    complete = generate(pipe, generator=generators())
    alone = pipe("b", output_type="latent", generator=generators()[4:5]).images
    assert torch.equal(alone[0], complete[4]), "the second image of the second prompt"
    assert torch.equal(generate(pipe, generator=tuple(generators())), complete)


def test_without_a_seed_the_global_generator_decides(pipe: DallePipeline) -> None:
    torch.manual_seed(3)
    first, second = generate(pipe), generate(pipe)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(generate(pipe), first)


# ------------------------------------------------------------ ranking


def test_the_best_come_first(pipe: DallePipeline) -> None:
    options = {"num_images_per_prompt": 6, "seed": 2, "output_type": "pt"}
    everything, best = pipe(PROMPTS, **options), pipe(PROMPTS, rerank=2, **options)
    assert pipe.ranker.asked == [caption for caption in PROMPTS for _ in range(6)]  # type: ignore[union-attr]
    assert best.images.shape == (6, 3, HEIGHT, WIDTH)
    for p in range(3):
        brightness = everything.images[6 * p : 6 * p + 6].mean((1, 2, 3))
        order = sorted(range(6), key=lambda index: -brightness[index])[:2]
        expected = [6 * p + index for index in order]
        at = slice(2 * p, 2 * p + 2)
        torch.testing.assert_close(best.scores[at], brightness[order], atol=ROUNDING, rtol=0)
        assert torch.equal(best.seeds[at], everything.seeds[expected])
        torch.testing.assert_close(best.images[at], everything.images[expected], atol=ROUNDING, rtol=0)


def test_ranking_decodes_every_candidate_once(pipe: DallePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[torch.Tensor] = []
    decode = pipe.image_tokenizer.decode

    def count(codes: torch.Tensor) -> torch.Tensor:
        decoded.append(codes)
        return decode(codes)

    monkeypatch.setattr(pipe.image_tokenizer, "decode", count)
    pipe(PROMPTS, num_images_per_prompt=6, rerank=2, seed=2)
    assert len(torch.cat(decoded)) == 6 * len(PROMPTS)


def test_an_image_can_be_generated_again_from_its_seed(pipe: DallePipeline) -> None:
    from dalle_zoo.sampling import sample_codes

    best = pipe("ab", num_images_per_prompt=6, rerank=1, seed=2, output_type="latent")
    again = sample_codes(pipe.prior, pipe.encode_text(["ab"]), best.seeds[None])
    assert torch.equal(again[0], best.images)


# ------------------------------------------------------------ priming


@pytest.mark.parametrize("rows", [1, 2, 3, None])
def test_the_top_of_an_image_is_kept(pipe: DallePipeline, rows: int | None) -> None:
    noise = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    retained = rows or 1  # half of 3 rows, rounded down
    given = pipe.image_tokenizer.encode(from_pil(image)[None])[0, :retained]
    for source in (image, from_pil(image)):
        codes = pipe(["ab", "c"], num_images_per_prompt=4, image=source, prime_rows=rows, seed=0, output_type="latent")
        assert torch.equal(codes.images[:, :retained], given.expand(8, -1, -1))
        different = len(codes.images.unique(dim=0))
        assert (
            different == 1 if retained == 3 else different > 4
        )  # two of eight may agree in the few cells that are left


def test_any_pil_image_is_brought_to_size(pipe: DallePipeline) -> None:
    for mode, size in (("RGB", (100, 30)), ("L", (5, 5)), ("RGBA", (WIDTH, HEIGHT)), ("P", (64, 64))):
        assert pipe.kept_codes(Image.new(mode, size), prime_rows=2).shape == (3, 4)


def test_a_mask_that_keeps_everything_is_noted(pipe: DallePipeline, caplog: pytest.LogCaptureFixture) -> None:
    image, mask = Image.new("RGB", (WIDTH, HEIGHT), "red"), Image.new("L", (WIDTH, HEIGHT))
    codes = pipe("ab", image=image, mask=mask, seed=0, output_type="latent").images
    assert torch.equal(codes[0], pipe.kept_codes(image, mask=mask))
    assert [message for message in caplog.messages if "the whole image is kept, so nothing is generated" in message]
    caplog.clear()
    mask.putpixel((0, 0), 255)
    pipe("ab", image=image, mask=mask, seed=0, output_type="latent")
    assert not [message for message in caplog.messages if "kept" in message]


# ------------------------------------------------------------ progress


@pytest.mark.parametrize(("batch_size", "jobs"), [(64, 1), (2, 6), (4, 3), (3, 6)])
def test_the_callback_counts_the_complete_call(pipe: DallePipeline, batch_size: int, jobs: int) -> None:
    calls: list[tuple[int, int]] = []
    generate(pipe, 4, seed=0, batch_size=batch_size, callback=lambda it: calls.append((it.done, it.total)))
    assert calls == [(done, 12 * jobs) for done in range(1, 12 * jobs + 1)]


def test_the_callback_sees_the_codes_so_far_and_may_stop(pipe: DallePipeline) -> None:
    seen: list[Tensor] = []
    common: dict[str, Any] = {"seed": 0, "batch_size": 2}
    codes = generate(pipe, 4, **common, callback=lambda progress: seen.append(progress.codes))
    assert seen[0].shape == (3, 4, 3, 4)
    assert [int((it != SAMPLE).sum()) for it in seen] == [2 * done for done in range(1, 73)]
    for it in seen:
        final = it != SAMPLE
        assert torch.equal(it[final], codes.view_as(it)[final])
    preview = pipe.preview(seen[12 + 5].flatten(0, 1))
    assert preview.shape == (12, 3, HEIGHT, WIDTH)
    assert (preview[5:] == 0.5).all()
    assert torch.equal(preview[:2], pipe.decode(codes[:2]))
    half = preview[2].view(3, 3, 4, 4, 4)  # channel, row of cells, pixel, column of cells, pixel
    assert (half[:, 0] != 0.5).any()
    assert (half[:, 2] == 0.5).all()

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, 4, **common, callback=stop)


# ------------------------------------------------------------ bad arguments


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"prompt": []}, TypeError, "prompt must be a string or a non-empty list of strings, got \\[\\]"),
        ({"prompt": ["a", 5]}, TypeError, "prompt must be a string or a non-empty list of strings"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"output_type": "png"}, ValueError, "output_type must be one of pil, np, pt, latent, got 'png'"),
        ({"rerank": 5}, ValueError, r"rerank must be an integer in 1\.\.4 \(images to keep.*\), got 5"),
        ({"rerank": 0}, ValueError, "rerank must be an integer in 1"),
        ({"seed": 1, "generator": GENERATOR}, ValueError, "give seed or generator, not both"),
        ({"generator": [GENERATOR] * 3}, ValueError, "expected 4 generators, one per image, got 3"),
        ({"prime_rows": 1}, ValueError, "prime_rows needs image"),
        (
            {"image": Image.new("RGB", (9, 9)), "prime_rows": 4},
            ValueError,
            r"prime_rows must be .* in 1\.\.3 .* got 4",
        ),
        (
            {"image": Image.new("RGB", (9, 9)), "prime_rows": 0},
            ValueError,
            "prime_rows must be .* at least 1, got 0",
        ),
        ({"image": torch.rand(3, 12, 12)}, ValueError, r"image must be a PIL image or have shape \(3, 12, 16\), got"),
        ({"image": torch.rand(1, 3, 12, 16)}, ValueError, r"image must be a PIL image or have shape \(3, 12, 16\)"),
        ({"temperature": -1}, ValueError, "temperature must be"),
        ({"top_k": 0}, ValueError, "top_k must be"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale must be a finite number"),
        ({"window": 0}, ValueError, "window must be an integer of at least 1"),
        ({"rerank": 1.0}, TypeError, "rerank must be an integer"),
        ({"image": torch.full((3, 12, 16), 200.0)}, ValueError, r"image must have pixels in \[0, 1\], got 200..200"),
        ({"image": torch.full((3, 12, 16), torch.nan)}, ValueError, r"image must have pixels in \[0, 1\], got nan"),
        (
            {"window": 8, "num_images_per_prompt": 5},
            ValueError,
            r"window is faster only for at most 4 images at once, got 5: omit window, or set batch_size to 1\.\.4",
        ),
    ],
)
def test_bad_arguments_are_refused(
    pipe: DallePipeline, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"prompt": "ab", "num_images_per_prompt": 4} | wrong
    with pytest.raises(error, match=message):
        pipe(**arguments)


def test_nothing_is_sampled_for_a_call_that_must_fail(pipe: DallePipeline) -> None:
    def sampled(*_: object) -> None:
        raise AssertionError("sampled before the arguments were checked")

    for wrong in ({"rerank": 1.0}, {"rerank": True}, {"image": torch.rand(3, 5, 5)}):
        with pytest.raises((TypeError, ValueError)):
            pipe("ab", callback=sampled, **wrong)


def test_integers_of_numpy_and_torch_are_integers(pipe: DallePipeline) -> None:
    plain = pipe("ab", num_images_per_prompt=2, seed=7, top_k=3, rerank=1, batch_size=1, output_type="latent")
    for kind in (np.int64, np.uint8, torch.tensor):
        other = pipe(
            "ab", num_images_per_prompt=kind(2), seed=kind(7), top_k=kind(3), rerank=kind(1), batch_size=kind(1),
            output_type="latent",
        )  # fmt: skip
        assert torch.equal(other.images, plain.images), kind


def test_a_pipeline_can_be_pickled(pipe: DallePipeline) -> None:
    generate(pipe, seed=1)  # fills the caches of the masks
    again = pickle.loads(pickle.dumps(pipe))
    assert torch.equal(generate(again, seed=1), generate(pipe, seed=1))
    assert torch.equal(generate(copy.deepcopy(pipe), seed=1), generate(pipe, seed=1))


@pytest.mark.parametrize("dtype", ["float16", torch.int8, 16])
def test_a_precision_is_checked_before_a_model_is_loaded(pipe: DallePipeline, dtype: Any, tmp_path: Path) -> None:
    for call in (
        lambda: DallePipeline.from_pretrained("no-such-model", dtype=dtype),
        lambda: load_model("no-such-model", "prior", dtype=dtype),
        lambda: pipe.save_pretrained(tmp_path / "m", dtype=dtype),
        lambda: pipe.to(dtype=dtype),
    ):
        with pytest.raises(TypeError, match=r"dtype must be one of torch.float32, .* got"):
            call()
    with pytest.raises(TypeError, match=r"device must be the name of a device, got torch.float16: pass dtype="):
        pipe.to(torch.float16)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_ranking_needs_a_ranker(make_pipe: Callable[..., DallePipeline]) -> None:
    with pytest.raises(ValueError, match="rerank needs a ranker, and this model has none"):
        make_pipe()("ab", rerank=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 8}, "the prior has 8 image tokens, the image tokenizer 7 codes"),
        ({"text_vocab": 300}, "the prior has 300 text tokens, the text tokenizer 256"),
    ],
)
def test_parts_that_do_not_belong_together(
    make_pipe: Callable[..., DallePipeline], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipe(**changes)


# ------------------------------------------------------------ folders


def test_a_model_comes_back(make_pipe: Callable[..., DallePipeline], tmp_path: Path) -> None:
    pipe = make_pipe()
    folder = pipe.save_pretrained(tmp_path / "model")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "config.json", "dvae/config.json", "dvae/model.safetensors", "model_index.json", "prior/config.json",
        "prior/model.safetensors", "record.json", "sha256.json", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DallePipeline"
    assert {name for name in index if name[0] != "_"} == {"dvae", "prior", "tokenizer"}
    back = DallePipeline.from_pretrained(folder)
    assert back.ranker is None
    assert torch.equal(generate(back, seed=3), generate(pipe, seed=3))
    again = DallePipeline.from_pretrained(back.save_pretrained(tmp_path / "again"))
    assert torch.equal(generate(again, seed=3), generate(pipe, seed=3))


def test_a_record_says_what_the_model_is(make_pipe: Callable[..., DallePipeline], tmp_path: Path) -> None:
    pipe = make_pipe()
    folder = pipe.save_pretrained(tmp_path / "model", record={"license": "CC0-1.0"})
    record = json.loads((folder / "record.json").read_text())
    assert record["license"] == "CC0-1.0"
    assert record["data"] == "unknown"
    counts = {"dvae": pipe.image_tokenizer, "prior": pipe.prior}
    assert record["parameters"] == {name: sum(p.numel() for p in net.parameters()) for name, net in counts.items()}


def test_a_ranker_comes_back(make_pipe: Callable[..., DallePipeline], tmp_path: Path) -> None:
    config = RankerConfig(
        image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=8, text_layers=1,
        text_heads=2, embed_dim=12, text_length=20, text_vocab=256,
    )  # fmt: skip
    pipe = make_pipe(Ranker.create(config, ByteTokenizer()).eval())
    pipe.save_pretrained(tmp_path / "model")
    back = DallePipeline.from_pretrained(tmp_path / "model")
    assert "ranker" not in vars(back), "read when it is needed"
    first, second = (p(PROMPTS, num_images_per_prompt=6, rerank=2, seed=1, output_type="pt") for p in (pipe, back))
    torch.testing.assert_close(first.scores, second.scores)
    assert torch.equal(first.seeds, second.seeds)
    assert torch.equal(first.images, second.images)
    back.save_pretrained(tmp_path / "model", overwrite=True)  # over the folder that it still reads from
    assert (tmp_path / "model/ranker/model.safetensors").is_file()
    DallePipeline.from_pretrained(tmp_path / "model")


def test_weights_in_half_precision(make_pipe: Callable[..., DallePipeline], tmp_path: Path) -> None:
    pipe = make_pipe()
    complete = pipe.save_pretrained(tmp_path / "complete")
    half = pipe.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(folder / "prior/model.safetensors").stat().st_size for folder in (complete, half)]
    assert sizes[1] < 0.8 * sizes[0]
    back = DallePipeline.from_pretrained(half, dtype=torch.bfloat16)
    assert back.prior.start_of_text.dtype == torch.bfloat16
    assert generate(back, seed=0).shape == (9, 3, 4)
    assert "12x16 pixels, on cpu" in repr(back)


def test_a_damaged_model_is_refused(make_pipe: Callable[..., DallePipeline], tmp_path: Path) -> None:
    folder = make_pipe().save_pretrained(tmp_path / "model")
    with (folder / "prior/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ModelFolderError, match=r"prior/model.safetensors differs from its sha256"):
        DallePipeline.from_pretrained(folder)
    DallePipeline.from_pretrained(folder, verify=False)
    (folder / "sha256.json").unlink()
    with pytest.raises(FileError, match=r"sha256.json is missing"):
        DallePipeline.from_pretrained(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelFolderError, match=r"has no model_index.json: expected a folder from save_pretrained"):
        DallePipeline.from_pretrained(folder)


def test_nothing_is_overwritten_unasked(make_pipe: Callable[..., DallePipeline], tmp_path: Path) -> None:
    pipe = make_pipe()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        pipe.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'no-such-model'"):
        DallePipeline.from_pretrained("no-such-model")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_rounded_weights_sample_and_are_not_saved(tmp_path: Path) -> None:
    pipe = DallePipeline.from_pretrained("composition", quantize="int8")
    codes = pipe("a cat", seed=0, output_type="latent").images
    exact = DallePipeline.from_pretrained("composition")("a cat", seed=0, output_type="latent").images
    assert codes.shape == exact.shape
    with pytest.raises(ValueError, match="weights that were rounded to fewer bits are not saved"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------- words that the model never saw


def test_a_pipeline_names_words_that_its_model_never_saw(
    make_pipe: Callable[..., DallePipeline], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make_pipe()
    pipe.tokenizer.words = {"a": 2, "cat": 1, "hat": 1}
    for number, opened in enumerate((pipe, DallePipeline.from_pretrained(pipe.save_pretrained(tmp_path / "saved")))):
        caplog.clear()
        opened(["a cat", "a dog", ""], seed=number, output_type="latent")
        first, second = caplog.messages
        assert first == "prompt 'a dog': the model never saw the word 'dog'"
        assert second.startswith("prompt '' has no words")
