"""Files at a location, opened for inspection: no tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_zoo.convert.checkpoints import open_checkpoint
from dalle_zoo.convert.pickles import UnrelatedFileError, WeightFileError
from dalle_zoo.convert.stored import Checkpoint
from dalle_zoo.paths import user_path
from dalle_zoo.plain_data import PlainDataError, json_value, yaml_value
from dalle_zoo.values import check_type

CONFIGS = (".json", ".yaml", ".yml")
"""Extensions of files that are read as configurations."""
MAX_CONFIG_BYTES = 2**20
"""Size limit of a configuration. Vocabularies and merges can be larger; they are JSON files too."""
MAX_FILES = 1000
"""Maximum number of files at a location."""


@dataclass(frozen=True)
class Location:
    """Opened files of external weights.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("en.model", "de.model"):
        ...         _ = Path(folder, name).write_text("a vocabulary")
        ...     location = inspect_files(folder)
        ...     try:
        ...         location.check_single([*location.files.values()], "vocabularies")
        ...     except WeightFileError as error:
        ...         print(str(error).partition("holds ")[2])
        several vocabularies (de.model, en.model): name the files of one with --files or files=
    """

    path: str
    """The paths as the caller gave them, for messages."""
    checkpoints: tuple[Checkpoint, ...]
    """Weight files, sorted by name."""
    configs: Mapping[str, dict[str, Any]]
    """Contents of the JSON and YAML files that hold a mapping, by file name."""
    unread: Mapping[str, str]
    """Why a file is neither weights nor a configuration, by file name."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Why a file that starts like weights, or has the extension of a configuration, cannot be read, by file name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """All files by name; a file in a sub-folder is named ``tokenizer/vocab.json``."""

    def check_single(self, paths: Sequence[Path], what: str) -> None:
        """Raises `WeightFileError` if several files hold something that a model has only once.

        Args:
            paths: Files that hold it.
            what: Its name in the plural, such as "vocabularies".
        """
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise WeightFileError(
                f"{self.path} holds several {what} ({names}): name the files of one with --files or files="
            )


def inspect_files(paths: str | Path | Sequence[str | Path], only: Sequence[str] = ()) -> Location:
    """Opens every file that may hold weights or a configuration.

    Args:
        paths: A file, a folder, or several of both that together make one location. Folders are searched one level
            deep. If no configuration is among the files, those in the usual places are added: ``NAME.yaml`` next to
            ``NAME.ckpt``, and the folder ``configs`` next to the folder of the file.
        only: Patterns of file names to inspect, such as ``*_mini.pt``. Defaults to all files.

    Raises:
        FileNotFoundError: A path does not exist, or a pattern matches no file.
        WeightFileError: Two files have the same name, there are more than `MAX_FILES` files, or a path is neither a
            file nor a folder.
        ValueError: No path is given, or `only` is a string instead of a list.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text('{"layers": 2}')
        ...     _ = Path(folder, "notes.txt").write_text("no weights")
        ...     location = inspect_files(folder)
        >>> location.configs, list(location.unread)
        ({'config.json': {'layers': 2}}, ['notes.txt'])
    """
    several = [paths] if isinstance(paths, str | Path) else paths
    check_type("paths", several, Sequence, "a path or a list of paths")
    given = [user_path(path) for path in several]
    if not given:
        raise ValueError("no location is given: expected files or folders of weights")
    if isinstance(only, str):
        raise ValueError(f"patterns of files must be given as a list, such as [{only!r}], got the text {only!r}")
    files = _select(_collect(given), only)
    checkpoints, configs, unread, damaged = [], {}, {}, {}
    for name, file in files.items():
        try:
            if file.suffix in CONFIGS:
                configs[name] = read_config(file)
            else:
                checkpoints.append(open_checkpoint(file))
        except UnrelatedFileError as error:
            unread[name] = str(error)
        except WeightFileError as error:
            damaged[name] = str(error)
    return Location(" and ".join(map(str, given)), tuple(checkpoints), configs, unread, damaged, files)


def _collect(given: Sequence[Path]) -> dict[str, Path]:
    """Returns all files by name, with the configurations in the usual places if there are no others."""
    files: dict[str, Path] = {}
    for path in given:
        for name, file in _files(path):
            if files.setdefault(name, file) != file:
                raise WeightFileError(
                    f"{file} and {files[name]} have the same name: rename one of them, or give only one"
                )
            if len(files) > MAX_FILES:
                raise WeightFileError(f"{path} has more than {MAX_FILES} files: give only the folder of the weights")
    if not any(file.suffix in CONFIGS for file in files.values()):
        files |= _companions(files.values())
    return files


def _select(files: dict[str, Path], only: Sequence[str]) -> dict[str, Path]:
    """Returns the files that match one of the patterns; all files if there are no patterns."""
    for pattern in only:
        if not any(Path(name).match(pattern) for name in files):
            raise FileNotFoundError(f"no file matches {pattern!r}: there are {', '.join(files) or 'none'}")
    if not only:
        return files
    return {name: file for name, file in files.items() if any(Path(name).match(pattern) for pattern in only)}


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Yields the names and paths of the files at one path."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a file of weights, or a folder of such files")
    if path.is_file():
        yield path.name, path
        return
    if not path.is_dir():
        raise WeightFileError(
            f"{path} is neither a file nor a folder: expected a file of weights, or a folder of such files"
        )
    for entry in sorted(path.iterdir()):
        if entry.is_file():
            yield entry.name, entry
        elif entry.is_dir() and not entry.name.startswith("."):
            yield from ((f"{entry.name}/{file.name}", file) for file in sorted(entry.iterdir()) if file.is_file())


def _companions(weights: Iterable[Path]) -> dict[str, Path]:
    """Returns the configurations in the usual places relative to weight files, by name."""
    places = [(file.with_suffix(".yaml"), file.parent.parent / "configs") for file in weights]
    adjacent = {file.name: file for file, _ in places if file.is_file()}
    runs = [file for folder in dict.fromkeys(folder for _, folder in places) for file in folder.glob("*.yaml")]
    return adjacent | {f"configs/{file.name}": file for file in sorted(runs) if file.is_file()}


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON or YAML file that holds a mapping.

    Raises:
        UnrelatedFileError: The file is too large, or does not hold a mapping.
        WeightFileError: `dalle_zoo.plain_data` refuses the contents.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        _check_end(path)
        raise UnrelatedFileError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: too long for a configuration")
    try:
        data = path.read_bytes()
        # Other programs write NaN into files that happen to be next to weights, such as logs of a training.
        value = json_value(data, finite=False) if path.suffix == ".json" else yaml_value(data.decode("utf-8"))
    except PlainDataError as error:
        raise WeightFileError(f"{path} {error}") from None
    except UnicodeDecodeError as error:
        raise WeightFileError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise UnrelatedFileError(f"{path} must hold a mapping, got {type(value).__name__}")
    return value


def _check_end(path: Path) -> None:
    """Raises `WeightFileError` if a JSON file that is too large to be parsed, such as a vocabulary, is truncated."""
    with path.open("rb") as file:
        file.seek(-64, 2)
        if path.suffix == ".json" and not file.read().rstrip().endswith((b"}", b"]")):
            raise WeightFileError(f"{path} does not end with a closing bracket: it is truncated or damaged")
