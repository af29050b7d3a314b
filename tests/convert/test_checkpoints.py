"""Weight files: files of torch and safetensors are read exactly; files with false sizes or offsets raise."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_zoo.convert import torch_files
from dalle_zoo.convert.checkpoints import open_checkpoint
from dalle_zoo.convert.lazy import in_float32, write_network
from dalle_zoo.convert.location import read_config
from dalle_zoo.convert.pickles import UnrelatedFileError, WeightFileError
from dalle_zoo.convert.stored import Storage, StoredTensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]
FORMATS = ["torch", "torch before 1.6", "safetensors"]


def write(value: Any, path: Path, form: str) -> Path:
    if form == "safetensors":
        save_file(value, path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "torch")
    return path


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(WeightFileError) as caught:
        read()
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights"


# ------------------------------------------------------------ valid files


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_of_every_dtype(form: str, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    value = {str(dtype): torch.randint(0, 2, (2, 3), generator=generator).to(dtype) for dtype in DTYPES}
    value |= {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 4), "one": torch.full((1, 1), -2.0)}
    opened = open_checkpoint(write(value, path, form))
    assert opened.format == form
    assert opened.tensors.keys() == value.keys()
    for name, tensor in value.items():
        stored = opened.tensors[name]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(stored.read(), tensor)


@pytest.mark.parametrize("form", FORMATS[:2])
def test_views_and_shared_storages(form: str, path: Path) -> None:
    complete = torch.arange(24.0).view(4, 6)
    value = {
        "complete": complete,
        "columns": complete[:, 1:3],
        "transposed": complete.t(),
        "row": complete[2],
        "last": complete[3, 5],
    }
    opened = open_checkpoint(write(value, path, form))
    for name, tensor in value.items():
        read = opened.tensors[name].read()
        assert torch.equal(read, tensor)
        assert read.is_contiguous()
    assert len({id(stored.storage) for stored in opened.tensors.values()}) == 1


@pytest.mark.parametrize("form", FORMATS[:2])
def test_pickled_modules_are_read(form: str, path: Path) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))
    module = nn.ModuleDict({"inner": inner, "table": nn.Embedding(3, 2)})
    opened = open_checkpoint(write(module, path, form))
    expected = module.state_dict()
    assert opened.tensors.keys() == expected.keys()
    assert all(torch.equal(stored.read(), expected[name]) for name, stored in opened.tensors.items())
    assert "torch.nn.modules.conv.Conv2d" in opened.names


def test_other_content_next_to_a_state_dict(path: Path) -> None:
    net = nn.Linear(2, 3)
    value = {
        "state_dict": net.state_dict(),
        "epoch": 7,
        "hyper_parameters": Namespace(width=8),
        "weight": torch.ones(1),
    }
    value["optimizer_states"] = [{"state": {0: {"exp_avg": torch.ones(2)}}}]
    opened = open_checkpoint(write(value, path, "torch"))
    assert list(opened.tensors) == ["state_dict.weight", "state_dict.bias", "weight"]
    assert set(opened.state_dict("state_dict.")) == {"weight", "bias"}
    assert opened.content["epoch"] == 7
    assert opened.content["hyper_parameters"].attributes == {"width": 8}
    assert opened.summary() == (
        "a file of torch with 3 tensors (state_dict.weight [3, 2], state_dict.bias [3], weight [1], ...); "
        "objects of argparse.Namespace"
    )


def test_a_header_whose_length_begins_like_a_pickle(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x280)
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.5))
    assert path.read_bytes().startswith(b"\x80\x02")
    assert open_checkpoint(path).tensors["a"].read().item() == 1.5


def test_a_file_truncated_after_opening_raises(path: Path) -> None:
    opened = open_checkpoint(write({"a": torch.ones(100)}, path, "safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    assert "ends too early" in refusal(opened.tensors["a"].read)


# ------------------------------------------------------------ invalid tensors


@pytest.mark.parametrize(
    ("shape", "stride", "start", "message"),
    [
        ((5,), (1,), 0, "beyond its storage"),
        ((2,), (4,), 0, "beyond its storage"),
        ((1,), (1,), 4, "beyond its storage"),
        ((2**40,), (0,), 0, "beyond its storage"),
        ((2,), (-1,), 1, "invalid shape, strides or offset"),
        ((-1,), (1,), 0, "invalid shape, strides or offset"),
        ((2,), (1,), -1, "invalid shape, strides or offset"),
        ((True,), (1,), 0, "invalid shape, strides or offset"),
        ((2.0,), (1,), 0, "invalid shape, strides or offset"),
        ((2**60,), (1,), 0, "invalid shape, strides or offset"),
        ((2,), (1, 1), 0, "invalid shape, strides or offset"),
        ((1,) * 9, (1,) * 9, 0, "9 dimensions, more than 8"),
    ],
)
def test_tensors_stay_within_their_storage(shape: Any, stride: Any, start: int, message: str) -> None:
    assert message in refusal(lambda: StoredTensor(Storage(Path("a"), torch.float32, 4), shape, stride, start))


# ------------------------------------------------------------ archives

Entries = list[tuple[zipfile.ZipInfo, bytes]]


def entries_of(path: Path) -> Entries:
    """Content of a small file of torch."""
    write({"a": torch.arange(64.0)}, path, "torch")
    with zipfile.ZipFile(path) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def rewrite(path: Path, entries: list[tuple[Any, bytes]], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for info, data in entries:
            archive.writestr(info.filename if isinstance(info, zipfile.ZipInfo) else info, data)
    return path


def test_a_rewritten_archive_is_read(path: Path) -> None:
    rewrite(path, entries_of(path))
    assert torch.equal(open_checkpoint(path).tensors["a"].read(), torch.arange(64.0))


def test_zip_bombs_raise(path: Path) -> None:
    entries = [(info, data if "/data/" not in info.filename else bytes(50_000_000)) for info, data in entries_of(path)]
    rewrite(path, entries, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "is compressed, " in refusal(lambda: open_checkpoint(path))


def test_false_sizes_in_the_directory_raise(path: Path) -> None:
    rewrite(path, entries_of(path))
    for size in (2**30, 255):  # of 256
        data = bytearray(path.read_bytes())
        at = data.rindex(b"weights/data/0") - 46  # its entry in the directory
        struct.pack_into("<II", data, at + 20, size, size)
        lying = path.with_name("lying")
        lying.write_bytes(data)
        assert refusal(lambda: open_checkpoint(lying)).startswith(f"{lying} cannot be opened: ")  # noqa: B023


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../evil", "leads out of its folder"),
        ("weights/../../evil", "leads out of its folder"),
        ("/etc/evil", "leads out of its folder"),
        ("weights\\..\\evil", "leads out of its folder"),
        ("C:/evil", "leads out of its folder"),
        ("other/data.pkl", "more than one folder"),
        ("weights/code/main.py", "TorchScript"),
    ],
)
def test_invalid_names_in_archives_raise(path: Path, name: str, message: str) -> None:
    rewrite(path, [*entries_of(path), (name, b"x")])
    assert message in refusal(lambda: open_checkpoint(path))
    assert list(path.parent.iterdir()) == [path]


def test_two_entries_of_one_name(path: Path) -> None:
    entries = entries_of(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewrite(path, [*entries, entries[0]])
    assert "two entries 'weights/data.pkl'" in refusal(lambda: open_checkpoint(path))


def test_overlapping_entries_raise(path: Path) -> None:
    rewrite(path, [*entries_of(path), ("weights/more", b"x" * 50)])
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"weights/more") - 46
    other = data.rindex(b"weights/data.pkl") - 46
    data[entry + 42 : entry + 46] = data[other + 42 : other + 46]
    path.write_bytes(data)
    assert "overlap" in refusal(lambda: open_checkpoint(path))


def test_encrypted_entries_raise(path: Path) -> None:
    rewrite(path, entries_of(path))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"weights/data/0") - 46 + 8] |= 1
    path.write_bytes(data)
    assert "is encrypted" in refusal(lambda: open_checkpoint(path))


def test_missing_entries_of_an_archive_raise(path: Path) -> None:
    entries = entries_of(path)
    rewrite(path, [e for e in entries if not e[0].filename.endswith("data.pkl")])
    assert "without data.pkl" in refusal(lambda: open_checkpoint(path))
    rewrite(path, [e for e in entries if "/data/" not in e[0].filename])
    assert "its storage '0' should have 256 bytes, but is missing" in refusal(lambda: open_checkpoint(path))
    rewrite(path, [(i, d[:-4] if "/data/" in i.filename else d) for i, d in entries])
    assert "its storage '0' should have 256 bytes, but has 252" in refusal(lambda: open_checkpoint(path))
    rewrite(path, [(i, b"big" if i.filename.endswith("byteorder") else d) for i, d in entries])
    assert "not little-endian" in refusal(lambda: open_checkpoint(path))


def test_too_large_archives_raise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(path, entries_of(path))
    monkeypatch.setattr(torch_files, "MAX_ENTRIES", 3)
    assert "entries, more than 3" in refusal(lambda: open_checkpoint(path))
    monkeypatch.setattr(torch_files.zipfile, "ZipFile", lambda _: pytest.fail("the directory was parsed"))
    assert "entries, more than 3" in refusal(lambda: open_checkpoint(path))
    monkeypatch.setattr(torch_files, "MAX_TABLE_BYTES", 10)
    assert "no directory, or one that is too long" in refusal(lambda: open_checkpoint(path))


def test_a_false_count_of_entries_raises(path: Path) -> None:
    rewrite(path, entries_of(path))
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\5\6")
    data[end + 8 : end + 12] = struct.pack("<HH", 1, 1)
    path.write_bytes(data)
    assert "does not have the number of entries that it states" in refusal(lambda: open_checkpoint(path))


def test_other_archives_and_pickles_raise(path: Path) -> None:
    rewrite(path, [("photos/1.jpg", b"x" * 1000)], compression=zipfile.ZIP_DEFLATED)
    for _ in range(2):
        with pytest.raises(UnrelatedFileError):
            open_checkpoint(path)
        path.write_bytes(pickle.dumps({"a": [1, 2]}))


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_weights_raise_as_damaged(form: str, path: Path) -> None:
    complete = write({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, path, form).read_bytes()
    for length in (len(complete) // 2, len(complete) - 1):
        path.write_bytes(complete[:length])
        with pytest.raises(WeightFileError) as caught:
            open_checkpoint(path)
        assert not isinstance(caught.value, UnrelatedFileError)


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_raises(form: str, path: Path) -> None:
    complete = write({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, path, form).read_bytes()
    for length in range(0, len(complete), max(1, len(complete) // 300)):
        path.write_bytes(complete[:length])
        refusal(lambda: open_checkpoint(path))


# ------------------------------------------------------------ pickles of torch

FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def archive(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a/data.pkl", pickled)
        opened.writestr("a/data/0", bytes(16))
    return file.getvalue()


def rebuilt(*arguments: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(arguments) + b"tR"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (rebuilt(FLOATS, b"K\x00", b"(K\x05t", b"(K\x01t"), "beyond its storage"),
        (rebuilt(FLOATS, b"K\x00", b"]", b"(K\x01t"), "without storage, shape or strides"),
        (rebuilt(b"K\x01", b"K\x00", b"(K\x04t", b"(K\x01t"), "without storage, shape or strides"),
        (rebuilt(FLOATS, b"K\x00", b"(K\x04t"), "missing 1 required positional argument"),
        (FLOATS.replace(b"FloatStorage", b"QInt8Storage"), "a storage of the kind Reference(torch.QInt8Storage)"),
        (FLOATS.replace(b"ctorch\n", b"cevil\n"), "a storage of the kind Reference(evil.FloatStorage)"),
        (FLOATS.replace(b"K\x04", b"K\x05"), "should have 20 bytes, but has 16"),
        (FLOATS.replace(b"K\x04", b"J\xff\xff\xff\xff"), "without a key or a size"),
        (FLOATS.replace(b"\x00\x00\x000", b"\x00\x00\x001"), "its storage '1' should have 16 bytes, but is missing"),
        (FLOATS + b"0" + FLOATS.replace(b"FloatS", b"IntS"), "two kinds or sizes"),
        (b"K\x01Q", "something other than a storage"),
        (b"(X\x04\x00\x00\x00evilK\x01tQ", "something other than a storage"),
        (FLOATS.replace(b"tQ", b"(K\x00ttQ"), "views of storages"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\x01K\x01K\x01tR", "a parameter that is not a tensor"),
    ],
)
def test_invalid_tensors_and_storages_raise(pickled: bytes, message: str, path: Path) -> None:
    path.write_bytes(archive(pickled + b"."))
    assert message in refusal(lambda: open_checkpoint(path))


def test_billion_laughs(path: Path) -> None:
    doubled = b"".join(
        b"}(X\x01\x00\x00\x00ah" + bytes([i]) + b"X\x01\x00\x00\x00bh" + bytes([i]) + b"uq" + bytes([i + 1])
        for i in range(60)
    )
    path.write_bytes(archive(b"}q\x00" + doubled + b"."))
    assert "too deeply or names it too often" in refusal(lambda: open_checkpoint(path))


def test_mappings_that_contain_themselves_raise(path: Path) -> None:
    path.write_bytes(archive(b"}q\x00X\x01\x00\x00\x00ah\x00s."))
    assert "too deeply or names it too often" in refusal(lambda: open_checkpoint(path))


def test_a_large_mapping_that_contains_itself_takes_no_memory(path: Path) -> None:
    first = b"X\x01\x00\x00\x00ah\x00"
    rest = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000))
    path.write_bytes(archive(b"}q\x00(" + first + rest + b"u."))
    tracemalloc.start()
    assert "too deeply or names it too often" in refusal(lambda: open_checkpoint(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 200_000_000, "64 levels of 200,000 members would take gigabytes"


def test_one_tensor_under_many_names(path: Path) -> None:
    tensor = rebuilt(FLOATS, b"K\x00", b"(K\x04t", b"(K\x01t")
    many = b"".join(b"J" + struct.pack("<i", i) + (tensor + b"q\x00" if i == 0 else b"h\x00") for i in range(20_000))
    path.write_bytes(archive(b"}(" + many + b"u."))
    assert len(open_checkpoint(path).tensors) == 20_000  # whose names take more bytes than the numbers


def test_shared_storages_have_a_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = torch.ones(1000)
    write({str(i): complete for i in range(10)}, path, "torch")
    open_checkpoint(path)
    monkeypatch.setattr("dalle_zoo.convert.stored.MAX_SHARING", 5)
    assert "over 5 times its own size" in refusal(lambda: open_checkpoint(path))


def test_invalid_names_of_tensors_raise(path: Path) -> None:
    write({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, path, "torch")
    assert "two tensors of the name a.b" in refusal(lambda: open_checkpoint(path))
    write({"a" * 600: {"b" * 600: torch.ones(1)}}, path, "torch")
    assert "a name of more than 300 characters" in refusal(lambda: open_checkpoint(path))


# ------------------------------------------------------------ torch before 1.6


def test_damaged_files_of_the_older_format_raise(path: Path) -> None:
    complete = write({"a": torch.arange(64.0)}, path, "torch before 1.6").read_bytes()
    assert complete.count(struct.pack("<q", 64)) == 1
    for old, new, message in [
        (struct.pack("<q", 64), struct.pack("<q", 63), "should have 64 elements, but has others"),
        (struct.pack("<q", 64), struct.pack("<q", 2**62), "should have 64 elements, but has others"),
        (b"little_endian", b"little_Endian", "not little-endian"),
        (b"\x6c\xfc\x9c\x46", b"\x6c\xfc\x9c\x47", "not one of torch.save"),
        (b"M\xe9\x03.", b"M\xea\x03.", "unknown version"),
    ]:
        assert old in complete
        path.write_bytes(complete.replace(old, new, 1))
        assert message in refusal(lambda: open_checkpoint(path))
    path.write_bytes(complete[:-1])
    assert "it is truncated" in refusal(lambda: open_checkpoint(path))


# ------------------------------------------------------------ safetensors


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (safetensors({}, length=2**63), "truncated, damaged or too long"),
        (safetensors({}, length=1000), "truncated, damaged or too long"),
        (safetensors(b"{" + b" " * 16 * 2**20 + b"}"), "the limit is 16777216: it is truncated, damaged or too long"),
        (safetensors({"a": entry(offsets=[0, 16])}, bytes(15)), "beyond the end of the file"),
        (safetensors(b"{"), "not valid JSON"),
        (safetensors(b'{"a": ' + b"[" * 100_000), "nests lists and mappings more than 64 deep"),
        (safetensors(b'{"\xff": 1}'), "not valid JSON"),
        (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "has a number of 5000 characters"),
        (safetensors(b'{"a": 1, "a": 2}'), "'a' twice"),
        (safetensors({"a": 1}), "must have exactly dtype, shape and data_offsets"),
        (safetensors({"a": entry(more=1)}), "must have exactly dtype, shape and data_offsets"),
        (safetensors({"a": entry(dtype="F31")}), "has the dtype F31"),
        (safetensors({"a": entry(dtype=["F32"])}), "has the dtype ['F32']"),
        (safetensors({"a": entry(shape=[5])}), "should have 20 bytes, but has 16"),
        (safetensors({"a": entry(shape=[2**47, 2**47])}), "but has 16"),
        (safetensors({"a": entry(shape=[-4])}), "invalid shape or invalid offsets"),
        (safetensors({"a": entry(shape=[True, 4])}), "invalid shape or invalid offsets"),
        (safetensors({"a": entry(shape=[1] * 9)}), "invalid shape or invalid offsets"),
        (safetensors({"a": entry(offsets=[16, 0])}), "invalid shape or invalid offsets"),
        (safetensors({"a": entry(offsets=[-16, 0])}), "invalid shape or invalid offsets"),
        (safetensors({"a": entry(offsets=[0])}), "invalid shape or invalid offsets"),
        (safetensors({"a": entry(offsets=[2**40, 2**40 + 16])}), "beyond the end of the file"),
        (safetensors({"a": entry(), "b": entry(shape=[2], offsets=[8, 16])}), "overlap"),
        (b"text that is nothing of this kind", "it is not a file of torch, safetensors or Flax"),
        (b"", "it is not a file of torch, safetensors or Flax"),
    ],
)
def test_damaged_safetensors_files_raise(data: bytes, message: str, path: Path) -> None:
    path.write_bytes(data)
    assert message in refusal(lambda: open_checkpoint(path))


# ------------------------------------------------------------ into a network


def stored(value: dict[str, Tensor], path: Path) -> dict[str, StoredTensor]:
    return open_checkpoint(write(value, path, "safetensors")).tensors


@dataclass(frozen=True)
class NoOptions:
    """A configuration without fields."""


class Weights(nn.Module):
    """A network of parameters."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.config = NoOptions()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, device="meta")))


def test_precision_of_written_tensors(path: Path, tmp_path: Path) -> None:
    value = {"a": torch.rand(3).half(), "b": torch.rand(2, dtype=torch.float64)}
    opened = stored(value, path)
    write_network(tmp_path / "as stored", "weights", Weights(a=3, b=2), opened)
    write_network(
        tmp_path / "float32", "weights", Weights(a=3, b=2), {name: in_float32(t) for name, t in opened.items()}
    )
    kept, single = (load_file(tmp_path / name / "model.safetensors") for name in ("as stored", "float32"))
    assert (kept["a"].dtype, kept["b"].dtype) == (torch.float16, torch.float32)
    assert (single["a"].dtype, single["b"].dtype) == (torch.float32, torch.float32)
    assert torch.equal(single["a"], value["a"].float())
    assert torch.equal(single["b"], value["b"].float())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "missing a"),
        ({"a": torch.ones(3), "b": torch.ones(1)}, "unexpected b"),
        ({"a": torch.ones(4)}, r"a has shape (4,), expected (3,)"),
        ({"a": torch.ones(3, dtype=torch.int64)}, "a is torch.int64, expected floating point"),
        ({"a": torch.ones(3, dtype=torch.bool)}, "a is torch.bool, expected floating point"),
        ({"a": torch.tensor([1, float("nan"), 2])}, "a has values that are not finite"),
        ({"a": torch.full((3,), 1e300, dtype=torch.float64)}, "a has values that are not finite"),
        ({"a": torch.tensor([1, float("inf"), 2]).half()}, "a has values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_the_network_raise(
    value: dict[str, Tensor], message: str, path: Path, tmp_path: Path
) -> None:
    tensors = {name: in_float32(tensor) for name, tensor in stored(value, path).items()}
    assert message in refusal(lambda: write_network(tmp_path / "out", "weights", Weights(a=3), tensors))


# ------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[" * 100_000, "nests lists and mappings more than 64 deep"),
        ("a.json", "[1]", "must hold a mapping, got list"),
        ("a.json", '{"a": ' + "9" * 5000 + "}", "has a number of 5000 characters"),
        ("a.json", '{"a": 1' + " " * 2**20 + "}", "too long for a configuration"),
        ("a.json", '{"a": 1' + " " * 2**20, "does not end with a closing bracket: it is truncated"),
        (
            "a.yaml",
            "a: &a [1, 2]\nb: *a\n",
            "has aliases (*name), which are not supported: replace them with their values",
        ),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "is not valid YAML: could not determine a constructor"),
        ("a.yaml", "a: [", "is not valid YAML: while parsing a flow node"),
        ("a.yaml", "[" * 5000, "nests lists and mappings more than 64 deep"),
        ("a.yml", "text", "must hold a mapping, got str"),
        ("a.yaml", "? {a: b}\n: c", "is not valid YAML: while constructing a mapping"),
    ],
)
def test_damaged_configurations_raise(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert message in refusal(lambda: read_config(tmp_path / name))


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vqgan.ckpt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(WeightFileError, match="pointer of Git LFS and not the file itself: run `git lfs pull`"):
        open_checkpoint(path)
