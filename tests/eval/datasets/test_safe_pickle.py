"""Pickles of plain data are read; all others raise before any code runs."""

from __future__ import annotations

import builtins
import collections
import copyreg
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dalle_zoo_eval.datasets import DatasetError, UnsafePickleError, load_plain, safe_pickle

PLAIN = [
    [[1, 2, 3], [4, -5, 2**80, 70_000, 300]],
    {0: "<end>", 1: "bird", 2: "vögel"},
    ("a", 1.5, True, False, None, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    {"nested": [{"deep": ([],)}], "again": ["x" * 300, "y" * 70_000]},
]


class Call:
    """An object that is pickled as a function call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.pickle"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN)
def test_plain_data_of_every_protocol_are_read(path: Path, value: Any, protocol: int) -> None:
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_plain(path) == value


@pytest.mark.parametrize("protocol", [4, 5])  # the earlier ones write sets and bytes as calls
def test_sets_and_bytes_are_read(path: Path, protocol: int) -> None:
    value = [{1, 2}, frozenset({3}), b"b", b"b" * 300]
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_plain(path) == value


def test_text_of_python_2_is_read(path: Path) -> None:
    # pickle.dumps(["a/b", u"c", "\xe9"], 2) of Python 2.7
    path.write_bytes(b"\x80\x02]q\x00(U\x03a/bq\x01X\x01\x00\x00\x00cq\x02U\x01\xe9q\x03e.")
    assert load_plain(path) == ["a/b", "c", "\xe9"]


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_of_python_2_are_read(path: Path, module: bytes) -> None:
    # As in the class numbers of AttnGAN's birds: protocol 0, and one scalar in the list twice.
    scalar = b"c" + module + b"\nscalar\np1\n(cnumpy\ndtype\np2\n(S'i8'\np3\nI0\nI1\ntp4\nRp5\n"
    scalar += b"(I3\nS'<'\np6\nNNNI-1\nI-1\nI0\ntp7\nbS'\\x80\\x01\\x00\\x00\\x00\\x00\\x00\\x00'\np8\ntp9\nRp10\n"
    path.write_bytes(b"(lp0\n" + scalar + b"ag10\na.")
    loaded = load_plain(path)
    assert loaded == [384, 384]
    assert {type(number) for number in loaded} == {int}


@pytest.mark.parametrize("dtype", ["<i2", ">i4", "<i8", "u1", "<u2", "<u4", "<u8", "<f4", ">f8"])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpy_scalars_are_read(path: Path, dtype: str, protocol: int) -> None:
    scalar = np.array([100], dtype)[0]
    path.write_bytes(pickle.dumps([scalar], protocol))
    assert load_plain(path) == [100]
    assert type(load_plain(path)[0]) in (int, float)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("deep", [False, True])
def test_code_is_not_executed(path: Path, tmp_path: Path, protocol: int, deep: bool) -> None:
    proof = tmp_path / "ran"
    calls = [
        Call(Path.touch, proof),
        Call(os.system, f"touch '{proof}'"),
        Call(subprocess.call, ["touch", str(proof)]),
        Call(eval, f"open({str(proof)!r}, 'w')"),
        Call(exec, f"open({str(proof)!r}, 'w')"),
        Call(getattr, builtins, "eval"),
    ]
    for call in calls:
        try:
            data = pickle.dumps([1, {"a": (call,)}] if deep else call, protocol)
        except (pickle.PicklingError, TypeError):
            continue  # modules are no arguments of a pickle
        path.write_bytes(data)
        with pytest.raises(UnsafePickleError, match=r"a\.pickle is not opened: it must hold only plain data"):
            load_plain(path)
        assert not proof.exists()
    path.write_bytes(pickle.dumps(calls[0], protocol))
    pickle.loads(path.read_bytes())
    assert proof.exists(), "the call does run where nothing stops it"


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(a=1),
        collections.defaultdict(list),
        np.arange(3),
        np.array([1j])[0],
        Path("a"),
        np.dtype("O"),
        1j,
        print,
    ],
    ids=repr,
)
def test_other_objects_raise(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value, 2))
    with pytest.raises(DatasetError, match=r"a\.pickle"):
        load_plain(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("INST", b"(ios\nsystem\n."),
        ("OBJ", b"(cnumpy\ndtype\nS'i8'\no."),
        ("NEWOBJ", b"\x80\x02cnumpy\ndtype\n)\x81."),
        ("NEWOBJ_EX", b"\x80\x04cnumpy\ndtype\n)}\x92."),
        ("PERSID", b"Pfoo\n."),
        ("BINPERSID", b"K\x01Q."),
        ("EXT1", b"\x80\x02\x82\x01."),
        ("BYTEARRAY8", b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f."),
        ("NEXT_BUFFER", b"\x80\x05\x97."),
    ],
)
def test_unneeded_instructions_raise(path: Path, name: str, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(UnsafePickleError, match=f"has the instruction {name}$"):
        load_plain(path)


def test_extension_registry_is_not_used(path: Path) -> None:
    copyreg.add_extension("os", "system", 241)
    try:
        path.write_bytes(b"\x80\x02\x82\xf1X\x04\x00\x00\x00true\x85R.")
        with pytest.raises(UnsafePickleError, match="EXT1"):
            load_plain(path)
    finally:
        copyreg.remove_extension("os", "system", 241)


def test_high_memo_index_allocates_no_memory(path: Path) -> None:
    path.write_bytes(b"\x80\x02Nr\xf0\xff\xff\xff.")  # Python's reader in C would take 64 GiB
    assert load_plain(path) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text that is no pickle",
        pickle.dumps(list(range(1000)), 2)[:-3],
        b"\x80\x02.",  # nothing on the stack
        b"\x80\x02h\x05.",  # a value that was never numbered
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"})" + b"\x85" * 1_000_000 + b"Ns.",  # a key whose hash would take the interpreter's stack
        b"\x80\x02K\x01)R.",  # the call of a number
        b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",  # a dtype of objects
        b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # longer than the file
    ],
)
def test_damaged_files_raise(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"a\.pickle is not a pickle, or is damaged"):
        load_plain(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cnumpy\ndtype\n(N" + b"2\x86" * 60 + b"tR.",  # a dtype whose hash takes years
        b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00i8tR(NN" + b"2\x86" * 60 + b"tb.",  # a byte order likewise
    ],
)
def test_expensive_values_are_not_hashed(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(UnsafePickleError, match=r"NumPy .* that is not a string"):
        load_plain(path)


def test_missing_file_raises(path: Path) -> None:
    with pytest.raises(DatasetError, match=r"FileNotFoundError"):
        load_plain(path)


def test_large_files_raise_without_being_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_pickle, "MAX_BYTES", 10)
    path.write_bytes(pickle.dumps("0123456789"))
    with pytest.raises(UnsafePickleError, match="bytes, more than 10"):
        load_plain(path)
