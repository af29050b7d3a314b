"""``dalle-zoo generate --prompts FILE``: many prompts, resumable, and shared by the processes of torchrun.

```
FILE ─► rows ─► batches of rows with equal options ─► images, then a record per row ─► manifest.jsonl at the end
```
A row is done when its record, which is written last, and its images exist. An image depends only on its prompt, seed
and options, so a resumed run, or another number of processes, gives the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_zoo.claims import CLAIM, ClaimedError, Claims
from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.outputs import check_folder
from dalle_zoo.cli.sampling import SAMPLING, checked_call, choose_device, stated_options, without_collection
from dalle_zoo.files import atomic_write, parse_json, try_read_json, write_json
from dalle_zoo.sharing import Share, device_of_environment
from dalle_zoo.values import as_integer
from dalle_zoo.zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from dalle_zoo.pipeline import DallePipeline

RECORDS = ".records"
"""Folder with one file per finished prompt."""
REQUEST = "request.json"
"""Which prompts, options and weights the records belong to."""
MANIFEST = "manifest.jsonl"
"""One line per image: id, prompt, image_path, seed, score and all options."""
OWN = ("id", "prompt", "num_images", "rerank", "seed", "negative_prompt", *SAMPLING)
"""Keys of a row of a JSONL file."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt of the file, with its options."""

    number: int
    """Position in the file, from 0."""
    id: str
    """Name of the row in the manifest."""
    prompt: str
    """The prompt."""
    num_images: int
    """Number of images to generate."""
    rerank: int | None
    """Number of images to keep; None: all."""
    seed: int | None
    """Seed of the row's first image; None: derived from the seed of the command."""
    negative_prompt: str | None
    """Text that guidance leads away from."""
    stated: dict[str, Any]
    """Temperature, filters and guidance that the row or the command line states; the model has the others."""

    def seeds(self, base: int) -> list[int]:
        """Seeds of the row's images."""
        from dalle_zoo.call import Call
        from dalle_zoo.sampling import derive_seed

        if self.seed is not None:
            return [int(seed) for seed in Call(self.prompt, self.num_images, seed=self.seed).seeds()[0]]
        return [derive_seed(base, self.number, k) for k in range(self.num_images)]

    def file_name(self, image: int) -> str:
        """Name of one of the row's images: number, prompt, number of the image."""
        words = re.sub(r"[^\w]+", "-", self.prompt.lower()).strip("-")[:40].rstrip("-")
        return f"{self.number:05d}-{words or 'prompt'}-{image:03d}.png"


def read_rows(name: Path, options: Namespace) -> list[Row]:
    """Reads the prompts of a file, or of standard input for ``-``.

    Args:
        name: Text file with one prompt per line, or ``.jsonl`` with one object per line: ``prompt``, and any of the
            other keys of `OWN`.
        options: The command line, whose options apply unless a row has its own.

    Raises:
        UserError: The file cannot be read, or a line is invalid; the message names the line.
    """
    is_stream = str(name) == "-"
    where = "standard input" if is_stream else str(name)
    try:
        text = (sys.stdin.buffer.read() if is_stream else name.read_bytes()).decode("utf-8-sig")  # Windows adds a mark
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8: convert it to UTF-8 text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{where} contains no prompts: expected one per line")
    is_json = name.suffix == ".jsonl" or (is_stream and lines[0][1].startswith("{"))
    rows = []
    for index, (number, line) in enumerate(lines):
        try:
            values = _parse(line) if is_json else {"prompt": line}
            rows.append(_row(index, values, options))
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}, line {number}: {error}") from None
    ((most, count),) = Counter(row.id for row in rows).most_common(1)
    if count > 1:
        raise UserError(f"{where}: the id {most!r} occurs more than once, but it names the row in {MANIFEST}")
    return rows


def _parse(line: str) -> dict[str, Any]:
    from dalle_zoo.call import as_texts

    values = parse_json(line.encode(), "the line")
    if unknown := sorted(values.keys() - {*OWN}):
        raise ValueError(f"unknown keys {', '.join(unknown)}: expected some of {', '.join(OWN)}")
    if "prompt" not in values:
        raise ValueError("prompt is missing")
    if not isinstance(values["prompt"], str):
        raise TypeError(f"prompt must be a string, got {values['prompt']!r}")
    if type(values.get("id", 0)) not in (str, int):
        raise TypeError(f"id must be a string or an integer, got {values['id']!r}")
    as_texts("id", str(values.get("id", 0)))
    return values


def _row(index: int, values: dict[str, Any], options: Namespace) -> Row:
    """Checks the values of a row, as a call of the pipeline would."""

    def value(name: str, default: Any = None) -> Any:
        given = getattr(options, name, None)
        return values.get(name, default if given is None else given)

    stated = stated_options(Namespace(**{name: value(name) for name in SAMPLING}))
    call = checked_call(
        values["prompt"], stated, num_images_per_prompt=value("num_images", 1), rerank=value("rerank"),
        seed=values.get("seed"), negative_prompt=value("negative_prompt"),
    )  # fmt: skip
    return Row(
        number=index,
        id=str(values.get("id", index)),
        prompt=values["prompt"],
        num_images=call.num_images_per_prompt,
        rerank=call.rerank,
        seed=values.get("seed"),
        negative_prompt=value("negative_prompt"),
        stated=stated,
    )


def batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Groups consecutive rows with equal options to at most ``batch_size`` images, at least one row each."""

    def kind(row: Row) -> tuple[Any, ...]:
        return row.stated, row.num_images, row.rerank, row.negative_prompt

    batch: list[Row] = []
    for row in rows:
        if batch and (kind(row) != kind(batch[0]) or (len(batch) + 1) * row.num_images > batch_size):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def generate_file(options: Namespace) -> None:
    """Generates the images of every prompt of a file."""
    unused = ("out", "image", "mask", "shift", "prime_rows", "window")
    if given := [f"--{name.replace('_', '-')}" for name in unused if getattr(options, name) is not None]:
        raise UserError(f"--prompts generates complete images in --folder: omit {', '.join(given)}")
    as_integer("--batch-size", options.batch_size, least=1)
    folder = options.folder or Path("images")
    check_folder("--folder", folder)
    share = Share.of_environment()
    with without_collection():
        import torch

        from dalle_zoo.pipeline import DallePipeline
    rows, base = read_rows(options.prompts, options), options.seed or 0
    name = options.device
    if name == "auto" and torch.cuda.is_available() and share.world > 1:
        name = device_of_environment("cuda")
    device, dtype = choose_device(name), options.dtype or "float32"
    pipe = DallePipeline.from_pretrained(
        DEFAULT_MODEL if options.model is None else options.model,
        device=device,
        dtype=getattr(torch, dtype),
        quantize=options.quantize,
    )
    if any(row.rerank is not None for row in rows) and pipe.ranker is None:
        raise UserError(f"--rerank needs a ranker, and {pipe.location} has none: omit it")
    _check_guidance(options.prompts, rows, pipe)
    folder.mkdir(parents=True, exist_ok=True)
    with Claims() as claims:
        claims.take(folder / CLAIM, wait=True)  # the processes of torchrun come here at the same time
        _claim(folder, request := _request(rows, base, pipe), options.overwrite)
    _run(pipe, rows, base, folder, request, options.batch_size, share)
    if _write_manifest(rows, folder):
        print((folder / MANIFEST).resolve())


def _check_guidance(name: Path, rows: Sequence[Row], pipe: DallePipeline) -> None:
    """Raises `UserError` if a negative prompt would not act: whether a model is guided is known once it is loaded."""
    for row in rows:
        try:
            checked_call(row.prompt, asdict(pipe.sampling.options(**row.stated)), negative_prompt=row.negative_prompt)
        except ValueError as error:
            raise UserError(f"{name}, prompt {row.id}: {error}") from None


def _request(rows: Sequence[Row], base: int, pipe: DallePipeline) -> str:
    """Digest of everything that determines the images."""
    described = [asdict(row) for row in rows]
    what = {
        "rows": described,
        "seed": base,
        "model": pipe.digest,
        "quantize": pipe.quantized,
        "dtype": str(pipe.prior_dtype),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _claim(folder: Path, request: str, overwrite: bool) -> None:
    """Binds a folder to the request, or raises if it holds another one's images."""
    records = folder / RECORDS
    if (records / REQUEST).is_file():
        if _is_bound(folder, request):
            return
        if not overwrite:
            raise FileExistsError(
                f"{folder} holds images of other prompts, options or weights: pass --overwrite to replace them, or "
                "choose another --folder"
            )
        _remove(folder)
    elif any(entry.name != CLAIM for entry in folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty: pass --overwrite, or choose another --folder")
    records.mkdir(parents=True, exist_ok=True)
    write_json(records / REQUEST, {"request": request})


def _is_bound(folder: Path, request: str) -> bool:
    return bool((try_read_json(folder / RECORDS / REQUEST) or {}).get("request") == request)


def _remove(folder: Path) -> None:
    """Removes the images and the records of another request.

    Raises:
        ClaimedError: A process still generates them.
    """
    records = folder / RECORDS
    earlier = try_read_json(records / REQUEST)
    write_json(records / REQUEST, {"request": None})  # ends a process before its next batch, see `_run`
    with Claims() as claims:
        try:
            for claim in records.glob("*.claim"):
                claims.hold(claim, f"images to {folder}")
        except ClaimedError:
            write_json(records / REQUEST, earlier or {})
            raise
        for record in set(records.glob("*.json")) - {records / REQUEST}:
            for line in _read_record(record):
                (folder / line["image_path"]).unlink(missing_ok=True)
            record.unlink()
    (folder / MANIFEST).unlink(missing_ok=True)


def _record(folder: Path, row: Row) -> Path:
    return folder / RECORDS / f"{row.number:06d}.json"


def _read_record(record: Path) -> list[dict[str, Any]]:
    """Returns the lines of a record; none if it is missing or damaged."""
    lines = (try_read_json(record) or {}).get("images")
    names = [line.get("image_path") for line in lines if isinstance(line, dict)] if isinstance(lines, list) else []
    is_valid = all(isinstance(name, str) and name and Path(name).name == name for name in names)
    return lines if isinstance(lines, list) and is_valid and len(names) == len(lines) else []


def _finished(folder: Path, row: Row) -> list[dict[str, Any]]:
    """Returns the lines of a row whose record and images exist; none otherwise."""
    lines = _read_record(_record(folder, row))
    return lines if all((folder / line["image_path"]).is_file() for line in lines) else []


def _run(
    pipe: DallePipeline, rows: Sequence[Row], base: int, folder: Path, request: str, batch_size: int, share: Share
) -> None:
    """Generates the batches of one process, except rows that are done."""
    from tqdm import tqdm

    per_process = math.ceil(sum(row.num_images for row in rows) / share.world)  # so that all processes have work
    mine = list(batches(rows, min(batch_size, per_process)))[share.rank :: share.world]
    total = sum(row.num_images for batch in mine for row in batch)
    with Claims() as claims, tqdm(total=total, unit="image", desc="generated", disable=None) as bar:
        for batch in mine:
            claim = _record(folder, batch[0]).with_suffix(".claim")
            claims.take(claim, wait=True)  # the same command may run twice
            if not _is_bound(folder, request):
                raise UserError(f"another command with --overwrite replaces {folder}: choose another --folder")
            if waiting := [row for row in batch if not _finished(folder, row)]:
                _generate(pipe, waiting, base, folder, batch_size)
            claims.release(claim)
            bar.update(sum(row.num_images for row in batch))


def _generate(pipe: DallePipeline, rows: Sequence[Row], base: int, folder: Path, batch_size: int) -> None:
    """Generates and writes the images of rows with equal options, then their records."""
    from dalle_zoo.images import save_png

    first = rows[0]
    output = pipe(
        [row.prompt for row in rows],
        num_images_per_prompt=first.num_images,
        rerank=first.rerank,
        seed=[seed for row in rows for seed in row.seeds(base)],
        negative_prompt=first.negative_prompt,
        batch_size=batch_size,
        progress_bar=False,  # there is one over all images
        **first.stated,
    )
    each = len(output.images) // len(rows)
    for index, row in enumerate(rows):
        lines = []
        for k in range(each):
            image, settings = output.images[index * each + k], output.settings[index * each + k]
            path = save_png(image, folder / row.file_name(k), settings)
            lines.append({"id": row.id, "image_path": path.name, **asdict(settings)})
        write_json(_record(folder, row), {"images": lines})


def _write_manifest(rows: Sequence[Row], folder: Path) -> bool:
    """Writes the manifest if all rows are done; other processes may still be at work otherwise."""
    finished = [_finished(folder, row) for row in rows]
    if not all(finished):
        return False
    lines = [line for each in finished for line in each]
    with atomic_write(folder / MANIFEST) as temporary:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")
    return True
