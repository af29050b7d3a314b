"""``dalle-zoo plot | export | consolidate | average``: use the results of runs."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from dalle_zoo.cli.outputs import check_file, check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo.cli.registered import members
from dalle_zoo.files import check_ending
from dalle_zoo.model_folder import ADAPTER, COMPONENTS
from dalle_zoo.plots import CURVES, read_rows


def plot(arguments: list[str]) -> None:
    """Plots the training curves of a run."""
    p = parser("plot", "Plot the training curves of a run.\n\n  dalle-zoo plot runs/prior/composition")
    p.add_argument("run", type=Path, help="folder of the run")
    p.add_argument("--out", type=Path, help="PNG file to write or replace [curves.png in the run]")
    options = p.parse_args(arguments)
    out = options.out or options.run / "curves.png"
    check_ending("--out", out)
    check_file("--out", out)
    curves = read_curves(options.run)
    from dalle_zoo.plots import plot_curves

    print(plot_curves(curves, out, title=str(options.run)).resolve())


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """Returns the curves of a run as name → (step → value).

    Earlier versions wrote a file ``metrics/version_N/metrics.csv`` per resume; for a step in several, the last counts.
    """
    older = sorted((run / "metrics").glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1]))
    files = [file for file in (*older, run / CURVES) if file.is_file()]
    if not files:
        if not run.is_dir():
            raise FileNotFoundError(f"{run} does not exist: expected the folder of a run")
        raise FileNotFoundError(
            f"{run} has no {CURVES}: expected the folder of a run with as many steps as trainer.log_every_n_steps"
        )
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for file in files:
        for row in read_rows(file)[1]:
            for name, value in row.items():
                if name not in ("epoch", "step") and value:
                    curves[name][int(row["step"])] = float(value)
    return {name: dict(sorted(points.items())) for name, points in sorted(curves.items())}


def export(arguments: list[str]) -> None:
    """Combines trained stages into a model folder."""
    p = parser(
        "export",
        "Combine trained stages into one folder that DallePipeline.from_pretrained loads.\n\n"
        "  dalle-zoo export --dvae runs/dvae/composition --prior runs/prior/composition \\\n"
        "      --ranker runs/ranker/composition --tokenizer runs/tokenizer --out my-model\n"
        "  dalle-zoo export --adapter runs/prior/finetune --out my-adapter",
    )
    for name, besides in (("dvae", ""), ("prior", ""), ("tokenizer", ", or byte")):
        p.add_argument(f"--{name}", help=f"run, component folder, or model{besides}")
    p.add_argument("--ranker", help="run, transformers CLIP folder, or model")
    p.add_argument("--adapter", help="run that trained LoRA adapters: writes them alone, without the other options")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--description", default="", help="one sentence about the model")
    p.add_argument("--license", default="unknown", help="SPDX identifier of the weights' license [unknown]")
    p.add_argument("--data", default="unknown", help="training data of the model [unknown]")
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="stored dtype [float32]",
    )
    p.add_argument("--temperature", type=float, help="sampling temperature where a call states none [1]")
    p.add_argument("--guidance-scale", type=float, help="guidance scale where a call states none [1: no guidance]")
    p.add_argument("--overwrite", action="store_true", help="replace an existing model")
    options = p.parse_args(arguments)
    check_folder("--out", options.out, overwrite=options.overwrite)
    record = {"description": options.description, "license": options.license, "data": options.data}
    given = {name: getattr(options, name) for name in COMPONENTS if getattr(options, name)}
    usual = {name: getattr(options, name) for name in ("temperature", "guidance_scale")}
    usual = {name: value for name, value in usual.items() if value is not None}
    if options.adapter:
        if others := [name.replace("_", "-") for name in (*given, *usual)]:
            p.error(f"--adapter is exported alone: omit --{' and --'.join(others)}")
        from dalle_zoo.adapters import adapter_folder

        source = trained(options.adapter, ADAPTER)
        print(adapter_folder(source, options.out, record, overwrite=options.overwrite).resolve())
        return
    if missing := [f"--{name}" for name in COMPONENTS[:3] if name not in given]:
        p.error(f"the following arguments are required: {', '.join(missing)}")
    if given["tokenizer"] in members("tokenizers"):  # its kind, such as byte
        del given["tokenizer"]
    parts = {name: trained(location, name) for name, location in given.items()}

    import torch

    from dalle_zoo.networks import load_image_tokenizer, load_prior
    from dalle_zoo.pipeline import DallePipeline
    from dalle_zoo.ranker_folder import load_ranker
    from dalle_zoo.sampling import SamplingDefaults
    from dalle_zoo.tokenizers import load_text_tokenizer
    from dalle_zoo.zoo import open_text_tokenizer

    sampling = SamplingDefaults(**usual)
    pipe = DallePipeline(
        load_image_tokenizer(parts["dvae"]),
        load_prior(parts["prior"]),
        load_text_tokenizer(parts["tokenizer"]) if "tokenizer" in parts else open_text_tokenizer(options.tokenizer),
        load_ranker(parts["ranker"]) if "ranker" in parts else None,
        sampling=sampling,
    )
    dtype: torch.dtype = getattr(torch, options.dtype)
    folder = pipe.save_pretrained(options.out, dtype=dtype, record=record, overwrite=options.overwrite)
    print(folder.resolve())


def consolidate(arguments: list[str]) -> None:
    """Converts a checkpoint, sharded or not, to a component folder."""
    p = parser(
        "consolidate",
        "Write the weights of a checkpoint of any strategy as a folder with safetensors files.\n\n"
        "  dalle-zoo consolidate runs/prior/12b --out prior-12b",
    )
    p.add_argument("checkpoint", type=Path, help="checkpoint, or a run, for its newest checkpoint")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--raw", action="store_true", help="write the raw weights instead of their moving average")
    p.add_argument("--overwrite", action="store_true", help="replace an existing component folder")
    options = p.parse_args(arguments)
    check_folder("--out", options.out, overwrite=options.overwrite)

    from dalle_zoo.files import new_folder
    from dalle_zoo.model_folder import NETWORK_FILES
    from dalle_zoo.training import checkpoints, integrity

    path = integrity.newest_intact(options.checkpoint) or options.checkpoint
    if path.suffix != ".ckpt" or not path.exists():
        raise FileNotFoundError(f"{options.checkpoint} is neither a run with checkpoints/*.ckpt nor a checkpoint")
    with new_folder(options.out, overwrite=options.overwrite, contents=NETWORK_FILES) as folder:
        stage = checkpoints.consolidate(path, folder, averaged=not options.raw)
    print(f"{options.out.resolve()}: {stage} of {path}")


def average(arguments: list[str]) -> None:
    """Averages the weights of priors of one architecture."""
    p = parser(
        "average",
        "Write the weighted mean of the weights of priors, such as one before and one after it was trained further.\n"
        "It often has much of what both can do (Wortsman et al., arXiv 2203.05482, 2109.01903). Export and evaluate\n"
        "it as any other prior.\n\n"
        "  dalle-zoo average composition runs/prior/composition --out prior-mean\n"
        "  dalle-zoo average runs/prior/a runs/prior/b --weights 1 3 --out prior-mean",
    )
    p.add_argument("priors", nargs="+", metavar="PRIOR", help="run, component folder, or model; two or more")
    p.add_argument("--weights", type=float, nargs="+", metavar="W", help="weight of each, above 0 [equal]")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace an existing component folder")
    options = p.parse_args(arguments)
    weights = options.weights or [1.0] * len(options.priors)
    if len(options.priors) < 2 or len(weights) != len(options.priors):
        p.error(f"expected two priors or more, and a weight for each, got {len(options.priors)} and {len(weights)}")
    if not all(0 < weight < math.inf for weight in weights):
        p.error(f"--weights must be finite and above 0 (omit a prior that has no weight), got {weights}")
    check_folder("--out", options.out, overwrite=options.overwrite)
    folders = [trained(location, "prior") for location in options.priors]

    from dalle_zoo.files import new_folder
    from dalle_zoo.model_folder import NETWORK_FILES
    from dalle_zoo.models import PRIORS
    from dalle_zoo.networks import mean_prior, save_network

    net = mean_prior(folders, weights)
    with new_folder(options.out, overwrite=options.overwrite, contents=NETWORK_FILES) as folder:
        save_network(net, PRIORS.name_of(type(net)), folder)
    print(f"{options.out.resolve()}: mean of {len(folders)} priors")


def trained(location: str, component: str) -> Path:
    """Returns the folder of a trained component: in a run, or where `find_component` finds it."""
    from dalle_zoo.zoo import find_component, model_names

    if location in model_names():  # a bundled name wins over a folder, as everywhere
        return find_component(location, component)
    run = Path(location) / "model" / component
    if run.is_dir():
        return run
    if (Path(location) / "checkpoints").is_dir():
        raise FileNotFoundError(f"{location} is a run that has not finished: {run} is missing; run the same fit again")
    return find_component(location, component)
