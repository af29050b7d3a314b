"""``dalle-zoo tokenizer | encode``: prepare the data of stage 2."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.cli.errors import UserError, check_device
from dalle_zoo.cli.outputs import check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo.sharing import Share, device_of_environment
from dalle_zoo.zoo import check_location, find_component


def tokenizer(arguments: list[str]) -> None:
    """Trains a BPE tokenizer on the captions of a data set."""
    p = parser(
        "tokenizer",
        "Train a BPE text tokenizer on the captions of a data set.\n\n"
        "  dalle-zoo tokenizer composition:train --vocab-size 2048 --out runs/tokenizer",
    )
    p.add_argument("data", help="shards, a folder, or a bundled split such as composition:train")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--vocab-size", type=int, default=16384, help="size of the vocabulary [16384, as in the paper]")
    p.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    p.add_argument(
        "--counts",
        type=Path,
        help="folder of the counted words, from which another vocabulary is trained without reading the captions "
        "again; needed under torchrun or srun, whose processes share the counting",
    )
    options = p.parse_args(arguments)
    share = Share.of_environment()
    if share.rank == 0:
        check_folder("--out", options.out, overwrite=options.overwrite)
    if options.counts is not None:
        check_folder("--counts", options.counts)
    elif share.world > 1:
        raise UserError(f"{share.world} processes share their counts in a folder: name it with --counts DIR")

    from dalle_zoo.data import open_source
    from dalle_zoo.data.counting import count_captions
    from dalle_zoo.files import new_folder
    from dalle_zoo.tokenizers import BPETokenizer
    from dalle_zoo.tokenizers.base import CONFIG_FILE
    from dalle_zoo.tokenizers.library import TOKENIZER_FILE
    from dalle_zoo.tokenizers.words import WORDS_FILE

    source = open_source(options.data)
    if share.rank != 0:  # that process trains
        count_captions(source, options.counts, share=share)
        return
    own = (CONFIG_FILE, TOKENIZER_FILE, WORDS_FILE)
    with new_folder(
        options.out, overwrite=options.overwrite, marker=CONFIG_FILE, contents=(*own, WORDS_FILE)
    ) as folder:
        counts = count_captions(source, options.counts, share=share)
        if not counts.captions:
            raise ValueError(f"{options.data} holds no captions")
        trained = BPETokenizer.train_counts(counts.pieces, vocab_size=options.vocab_size)
        trained.words = counts.words
        trained.save(folder)
    lengths = sorted(len(trained.encode(caption)) for caption in counts.sample)
    print(
        f"{options.out}: {trained.vocab_size} entries; tokens per caption: median {lengths[len(lengths) // 2]}, "
        f"99 % {lengths[int(len(lengths) * 0.99)]}, longest {lengths[-1]}"
    )


def encode(arguments: list[str]) -> None:
    """Encodes images once as code shards, from which the prior is trained."""
    p = parser(
        "encode",
        "Encode the images of a data set as code shards. Run the same command again to resume an interrupted one.\n\n"
        "  dalle-zoo encode composition:train --model composition --out codes/train",
    )
    p.add_argument("data", help="shards, a folder, or a bundled split such as composition:train")
    p.add_argument("--model", required=True, help="model, or folder of an image tokenizer")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--variants", type=int, default=1, help="random crops per image [1]")
    p.add_argument("--seed", type=int, default=0, help="seed of the random crops [0]")
    p.add_argument("--batch-size", type=int, default=32, help="images per batch [32]")
    p.add_argument("--samples-per-shard", type=int, default=16384, help="maximum number of images per shard [16384]")
    p.add_argument("--device", default="cpu", help="device: cpu, cuda, … [cpu]")
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision; bfloat16 is faster but changes a few percent of the codes [float32]",
    )
    p.add_argument("--compile", action="store_true", help="compile the network first; pays off in long runs on a GPU")
    p.add_argument("--overwrite", action="store_true", help="replace code shards once the new ones are complete")
    options = p.parse_args(arguments)
    if options.compile and options.device == "cpu":
        raise UserError("--compile needs a GPU: on a CPU the convolutions are already fused; leave it out")
    check_location(options.model)
    check_folder("--out", options.out)  # an interrupted encoding is resumed there

    import torch

    from dalle_zoo.data import encode_source, open_source
    from dalle_zoo.files import sha256_file
    from dalle_zoo.model_folder import WEIGHTS
    from dalle_zoo.networks import load_image_tokenizer

    share, device = Share.of_environment(), device_of_environment(options.device)
    check_device(device)
    folder = find_component(options.model, "dvae")
    net = load_image_tokenizer(folder, device)
    if options.compile:
        net.compile_networks()
    half = options.dtype == "bfloat16"
    info = {"codebook_size": net.codebook_size, "weights_sha256": sha256_file(folder / WEIGHTS)}

    def codes_of(images: torch.Tensor) -> torch.Tensor:
        kind = torch.device(device).type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=half):
            return net.encode(images.to(device)).cpu()

    manifest = encode_source(
        open_source(options.data),
        codes_of,
        options.out,
        size=net.image_size,
        variants=options.variants,
        seed=options.seed,
        batch_size=options.batch_size,
        samples_per_shard=options.samples_per_shard,
        info=info | ({"dtype": options.dtype} if half else {}),
        overwrite=options.overwrite,
        share=share,
    )
    skipped = f", {manifest['num_skipped']} skipped" if manifest["num_skipped"] else ""
    print(f"{options.out}: {manifest['count']} samples, {len(manifest['shards'])} shards{skipped}")
