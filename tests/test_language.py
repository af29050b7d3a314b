"""The project speaks the language of its field: words that no file contains, and what to write instead."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TERMS = {
    r"[Pp]ictures?|PICTURE": "image",
    r"\b[Dd]rawn from\b|\bdraws? (a token|tokens|images?)\b|\bdraw_(images?|tokens?|masks?)\b": "sampled, generated",
    r"\bin the box\b": "bundled",
    r"\bof (ours|theirs)\b|\bforeign\b": "native, external, converted",
    r"\b[Ii]f missing\.|; default if missing": "Defaults to ...",
    r"\b[Rr]emed(y|ies)\b": "suggestion",
    r"\blay_over\b": "merge",
    r"\bCodeData\b|\bCaptionedData\b": "CodeDataModule, CaptionedDataModule",
    r"\bby heart\b": "memorized",
    r"\bone an? (step|image|prompt|caption|line|file|folder|block|layer|process|pattern|record)\b": "one per ...",
    r"\b(an?|one) (idea|file|line|key|record|row|scale) a (file|line|step|pattern|block|member|layer)\b":
        "one ... per ...",
    r"\b(once|GPUs?|pass(es)?|slots?|vectors?|nats|bytes) an? (call|step|node|rank|layer|cell|token|candidate)\b":
        "... per ...",
    r"\b[Vv]erdicts?\b|\b[Cc]ulprits?\b": "failure report, failed ranks",
    r"\b[Jj]udge[sd]?\b": "metric, ranker, generated set",
    r"\b[Ww]hole (weights|networks?|checkpoints?|model)\b": "complete, unsharded",
    r"\bat_turn\b": "step",
    r"\b(lies?|lay|stands?|stood) (beside|behind|next to|on (the )?disk|apart|there|here)\b": "is next to, follows",
    r"\bby (its|their) own name\b": "named",
    r"\b(must|and|rank|part) lie\b|\blies? (in|at|on|half)\b": "must be in, is in",
    r"\bstands? (at|in|on|round|twice)\b": "is in, appears",
    r"\bso many\b": "this number of",
    r"\bat hand\b": "available",
    r"\blooked for\b": "searched",
    r"\bbut for\b": "except",
    r"(?<!first )\blook(s|ed)? at\b": "inspect, read",
    r"\bnotes? down\b": "log, record",
    r"\bas of ``?\w": "as for, from, returned by",
    r"\bin front of\b": "before",
    # American spelling, as in torch, Lightning and diffusers.
    r"(?i)\b\w*(optimi|normali|quanti|initiali|recogni|memori|factori|vectori|rasteri|seriali|tokeni|summari|organi"
    r"|generali|reali|minimi|maximi|visuali|synchroni|penali|utili)(s(e|ed|es|er|ers|ing|ation|ations))\b": "...ize",
    r"(?i)\b\w*(colour|neighbour|behaviour|favour|honour)\w*": "...or",
    r"(?i)\b(centre[sd]?|grey|licences?|catalogues?|artefacts?|analyse[sd]?|modelled|labelled|travelled|cancelled)\b":
        "American spelling: center, gray, license, catalog, artifact, analyze, modeled, ...",
}  # fmt: skip
"""A pattern, and what to write instead."""

EXEMPT = {
    "eval/captions/*": "captions of data sets, word for word",
    "tests/test_language.py": "holds the patterns themselves",
    "LICENSE": "text of others",
    "THIRD_PARTY_NOTICES.md": "repeats notices of others",
    "CODE_OF_CONDUCT.md": "text of others",
    "docs/migration.md": "its tables have the old names",
    "tests/golden/*.json": "tensors and names of other code bases",
    "*tokenizer.json": "vocabularies",
    "*words.json": "words of captions",
    "dalle_zoo/_data/*": "captions and names of the data set's sources",
}
"""Files that may contain any word, and why."""

QUOTED = {
    ("dalle_zoo/composition/picker.py", "picture"): "a caption as people write it",
    ("dalle_zoo/data/folder.py", "pictures"): "names a random stream: another name would give another order",
    ("dalle_zoo/web/engine.py", "cancelled"): "a method of concurrent.futures",
    ("tools/sprite_names.txt", "picture"): "a name of an emoji",
    ("tests/test_repository.py", "rasterised"): "quotes THIRD_PARTY_NOTICES.md",
}
"""A file and a word that it may contain, and why."""


@cache
def checked() -> dict[str, list[str]]:
    """Lines of every tracked text file that is not exempt."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    lines = {}
    for name in filter(None, listed.stdout.split("\0")):
        if not any(fnmatch(name, pattern) for pattern in EXEMPT) and (ROOT / name).is_file():
            try:
                lines[name] = (ROOT / name).read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                continue  # images, shards, weights
    return lines


@pytest.mark.parametrize(("pattern", "instead"), TERMS.items(), ids=[f"{i}" for i in TERMS.values()])
def test_no_file_contains(pattern: str, instead: str) -> None:
    found = [
        f"{name}:{number}: {match.group()!r} in {line.strip()[:100]!r}"
        for name, lines in checked().items()
        for number, line in enumerate(lines, 1)
        if (match := re.search(pattern, line)) and (name, match.group()) not in QUOTED
    ]
    assert not found, "\n".join([f"write instead: {instead}", *found])


def test_the_check_covers_the_repository() -> None:
    assert len(checked()) > 100
    assert {"README.md", "CONTRIBUTING.md", "dalle_zoo/masks/row.py", "Makefile"} <= set(checked())
