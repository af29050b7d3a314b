"""Pickles of objects: no code runs, nothing is imported, and memory is bounded by the size of the file."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.convert import object_pickles
from dalle_zoo.convert.checkpoints import open_checkpoint
from dalle_zoo.convert.object_pickles import load_objects
from dalle_zoo.convert.pickles import Placeholder, Reference, WeightFileError, shown


def text(value: str) -> bytes:
    """A string of a pickle."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """The call of a function; each argument is the code that makes it."""
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def _bytes(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def calling(module: str, name: str, *more: bytes) -> Callable[[str], bytes]:
    """Maker of a pickle that calls a function with a shell command and more arguments."""
    return lambda command: call(module, name, text(command), *more) + b"."


def _chain(command: str) -> bytes:
    system = call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))
    return system + text(command) + b"\x85R."


def _object_array(command: str) -> bytes:
    empty = call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", b"(K\x00t", text("b"))
    dtype = call("numpy", "dtype", text("O8"), b"K\x00", b"K\x01")
    return empty + b"(K\x01(K\x01t" + dtype + b"\x89]" + call("os", "system", text(command)) + b"atb."


RUNNING: dict[str, Callable[[str], bytes]] = {
    "os.system": calling("os", "system"),
    "posix.system": calling("posix", "system"),
    "os.popen": calling("os", "popen"),
    "subprocess.Popen": lambda c: call("subprocess", "Popen", b"(" + text("sh") + text("-c") + text(c) + b"l") + b".",
    "subprocess.getoutput": calling("subprocess", "getoutput"),
    "commands of Python 2": calling("commands", "getoutput"),
    "eval": lambda c: call("builtins", "eval", text(f"__import__('os').system({c!r})")) + b".",
    "exec": lambda c: call("builtins", "exec", text(f"__import__('os').system({c!r})")) + b".",
    "eval of Python 2": lambda c: call("__builtin__", "eval", text(f"__import__('os').system({c!r})")) + b".",
    "chain of getattr": _chain,
    "map": lambda c: call("builtins", "list", call("builtins", "map", b"cos\nsystem\n", b"(" + text(c) + b"l")) + b".",
    "functools.partial": lambda c: call("functools", "partial", b"cos\nsystem\n", text(c)) + b")R.",
    "operator.methodcaller": lambda c: call("operator", "methodcaller", text("system"), text(c)) + b".",
    "importlib": lambda c: call("importlib", "import_module", text("antigravity")) + b".",
    "runpy": lambda c: call("runpy", "run_module", text("this")) + b".",
    "timeit": lambda c: call("timeit", "timeit", text(f"__import__('os').system({c!r})"), *[b"N"] * 2) + b".",
    "code of an interpreter": lambda c: call("code", "InteractiveInterpreter") + b".",
    "ctypes": lambda c: call("ctypes", "CDLL", text("libc.so.6")) + b".",
    "pty": calling("pty", "spawn"),
    "pickle in a pickle": lambda c: call("pickle", "loads", _bytes(b"N.")) + b".",
    "dotted name": lambda c: call("pathlib", "Path.touch", call("pathlib", "Path", text(c.split("'")[1]))) + b".",
    "dotted name on a stack": lambda c: (
        b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(c) + b"\x85R."
    ),
    "copyreg": lambda c: (
        call("copyreg", "_reconstructor", b"csubprocess\nPopen\n", b"cbuiltins\nobject\n", b"N") + b"."
    ),
    "copyreg.add_extension": lambda c: call("copyreg", "add_extension", text("os"), text("system"), b"K\x01") + b".",
    "state of a class": lambda c: (
        b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb" + text(c) + b"b."
    ),
    "type": lambda c: call("builtins", "type", text("A"), b")", b"}") + b".",
    "numpy array of objects": _object_array,
    "NEWOBJ": lambda c: b"\x80\x02csubprocess\nPopen\n" + text(c) + b"\x85\x81.",
    "NEWOBJ_EX": lambda c: b"\x80\x04csubprocess\nPopen\n" + text(c) + b"\x85}\x92.",
    "INST": lambda c: b"(" + text(c) + b"ios\nsystem\n.",
    "OBJ": lambda c: b"(cos\nsystem\n" + text(c) + b"o.",
    "EXT1": lambda c: b"\x80\x02\x82\xf1" + text(c) + b"\x85R.",
    "EXT2": lambda c: b"\x80\x02\x83\xf1\x00" + text(c) + b"\x85R.",
    "EXT4": lambda c: b"\x80\x02\x84\xf1\x00\x00\x00" + text(c) + b"\x85R.",
    "in a mapping": lambda c: b"}" + text("state_dict") + b"}" + text("w") + call("os", "system", text(c)) + b"ss.",
    "thrown away": lambda c: call("os", "system", text(c)) + b"0N.",
    "decoder of text": lambda c: call("_codecs", "decode", text("cos"), text("rot13")) + b".",
    "codec of bytes": lambda c: call("_codecs", "encode", text("cos"), text("rot13")) + b".",
}
"""Pickles that run a shell command, or part of the way there, where nothing stops them: refused."""

INERT: dict[str, Callable[[str], bytes]] = {
    "torch.hub": lambda c: call("torch.hub", "load", text("a/b"), text("c")) + b".",
    "torch's import of os": lambda c: call("torch.serialization", "os.system", text(c)) + b".",
    "dotted name of torch": lambda c: (
        b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93" + text(c) + b"\x85R."
    ),
    "torch in a pickle": lambda c: (
        call("torch.storage", "_load_from_bytes", _bytes(call("os", "system", text(c)))) + b"."
    ),
    "numpy's runstring": lambda c: call("numpy.testing._private.utils", "runstring", text("import this"), b"}") + b".",
    "pip": lambda c: call("pip", "main", b"(" + text("install") + text("x") + b"l") + b".",
    "state of an external class": lambda c: (
        b"csome.package\nThing\n)\x81}" + text("__class__") + text("evil") + b"sb."
    ),
    "setstate of an external class": lambda c: (
        b"csome.package\nThing\n)\x81}" + text("__setstate__") + b"csome.package\nrun\nsb" + text(c) + b"b."
    ),
    "hyper-parameters": lambda c: b"cargparse\nNamespace\n)\x81}" + text("width") + b"K\x08sb.",
}
"""Pickles that name what is not there or not harmless, and are read into placeholders."""

HOSTILE: dict[str, bytes] = {
    "number of a value": b"\x80\x02Nr\xf0\xff\xff\xff" + b"0" * 3 + b".",
    "length of bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "length of text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "length of an array": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "length of a frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "length of an integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "digits of an integer": b"I" + b"9" * 20_000 + b"\n.",
    "line without an end": b"V" + b"a" * 100,
    "buffers": b"\x80\x05\x97.",
    "text identifier": b"Psome\n.",
    "key of nested tuples": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "list as a key": b"}]Ns.",
    "call of a number": b"K\x01)R.",
    "call without a tuple": b"csome\nthing\n]R.",
    "state of a list": b"]}b.",
    "state of a reference": b"csome\nthing\n}b.",
    "append to a tuple": b")Na.",
    "item of a list": b"]K\x00Ns.",
    "key without a value": b"}(Nu.",
    "set of lists": b"\x80\x04\x8f(]\x90.",
    "frozen set of lists": b"\x80\x04(]\x91.",
    "pairs that are none": b"ccollections\nOrderedDict\n(](K\x01K\x02eatR.",
    "module that is no text": b"\x80\x04NN\x93.",
    "empty": b"",
    "no stop": b"\x80\x02N",
    "nothing to give": b"\x80\x02.",
    "value that was never numbered": b"\x80\x02h\x05.",
    "unknown instruction": b"\xff.",
    "protocol of the future": b"\x80\x7fN.",
}
"""Pickles that are damaged, or ask for memory or the interpreter's stack: refused. Those whose memory is only asked
for and never used are followed by damage."""


def zip_file(pickled: bytes, storages: dict[str, bytes] | None = None, top: str = "archive") -> bytes:
    """A file of torch 1.6 or later around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{top}/data.pkl", pickled)
        archive.writestr(f"{top}/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"{top}/data/{key}", data)
        archive.writestr(f"{top}/version", "3\n")
    return file.getvalue()


def legacy_file(pickled: bytes, storages: dict[str, bytes] | None = None, itemsize: int = 4) -> bytes:
    """A file of torch before 1.6 around a pickle."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [0x1950A86A20F9469CFC6C, 1001, machine]
    data = b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps(sorted(storages or {}), 2)
    for _, storage in sorted((storages or {}).items()):
        data += struct.pack("<q", len(storage) // itemsize) + storage
    return data


CARRIERS: dict[str, Callable[..., bytes]] = {"zip": zip_file, "legacy": legacy_file}


# ------------------------------------------------------------ audit of imports, executions and writes

EVENTS = (
    "os.",
    "subprocess.",
    "import",
    "exec",
    "compile",
    "ctypes.",
    "socket.",
    "pty.",
    "shutil.",
    "pickle.find_class",
)
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if _seen is not None and (event.startswith(EVENTS) or writing):
        _seen.append(f"{event} {arguments}")


sys.addaudithook(_hook)  # stays until the process ends, so it looks only while asked to


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Calls a function and fails if anything was imported, executed, started or written meanwhile."""

    def call_it(function: Callable[..., Any], *arguments: Any) -> Any:
        global _seen
        _seen = seen = []
        try:
            return function(*arguments)
        finally:
            _seen = None
            assert not seen
            assert not (tmp_path / "ran").exists()

    "".encode("cp437")  # which zipfile imports
    copyreg.add_extension("os", "system", 0xF1)
    try:
        yield call_it
    finally:
        copyreg.remove_extension("os", "system", 0xF1)
        copyreg.clear_extension_cache()


@pytest.fixture
def command(tmp_path: Path) -> str:
    return f"touch '{tmp_path / 'ran'}'"


def load(data: bytes) -> Any:
    return load_objects(io.BytesIO(data), len(data))[0]


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(WeightFileError) as caught:
        read()
    return str(caught.value)


# ------------------------------------------------------------ attacks


def test_the_number_of_attacks() -> None:
    assert len(RUNNING) + len(HOSTILE) >= 60


@pytest.mark.parametrize(
    "name", ["os.system", "eval", "chain of getattr", "map", "OBJ", "INST", "EXT1", "thrown away"]
)
def test_attacks_run_under_the_standard_unpickler(name: str, command: str, tmp_path: Path, watched: Any) -> None:
    pickle.loads(RUNNING[name](command))
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with pytest.raises(AssertionError):
        watched(os.system, "true")  # and the watch sees it


@pytest.mark.parametrize("name", RUNNING)
def test_pickles_that_run_code_raise(name: str, command: str, watched: Any) -> None:
    said = watched(refusal, lambda: load(RUNNING[name](command)))
    assert "which weights have no use for" in said or "writes bytes in the encoding 'rot13'" in said


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", RUNNING)
def test_pickles_that_run_code_in_files_of_torch_raise(
    name: str, carrier: str, command: str, watched: Any, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(CARRIERS[carrier](RUNNING[name](command)))
    assert f"{path} cannot be opened: " in watched(refusal, lambda: open_checkpoint(path))


@pytest.mark.parametrize("name", INERT)
def test_unknown_or_harmful_names_become_placeholders(name: str, command: str, watched: Any) -> None:
    value = watched(load, INERT[name](command))
    assert isinstance(value, Placeholder)


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_oversized_pickles_raise(name: str, watched: Any) -> None:
    watched(refusal, lambda: load(HOSTILE[name]))


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_oversized_pickles_in_files_of_torch_raise(
    name: str, carrier: str, watched: Any, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(CARRIERS[carrier](HOSTILE[name]))
    assert f"{path} cannot be opened: " in watched(refusal, lambda: open_checkpoint(path))


def doubled(start: bytes, levels: int = 60) -> bytes:
    """A tuple that holds one tuple twice, which holds another one twice, and so on: 2^60 when it is printed."""
    return start + b"2\x86" * levels


def test_exploding_values_are_never_printed_compared_or_hashed(tmp_path: Path) -> None:
    latin1 = b"c_codecs\nencode\nX\x01\x00\x00\x00a" + doubled(b"N") + b"\x86R."
    storage = b"(X\x07\x00\x00\x00storage" + doubled(b"N") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."
    for name, data in {"encoding": latin1, "kind": storage, "key": b"}" + doubled(b"N") + b"Ns."}.items():
        for carrier in CARRIERS:
            (tmp_path / name).write_bytes(CARRIERS[carrier](b"\x80\x02" + data))
            assert len(refusal(lambda path=tmp_path / name: open_checkpoint(path))) < 1000
    assert shown(load(b"\x80\x02" + doubled(b"N") + b".")).startswith("((((...), (...)), ((...), (...))), (((")
    assert len(shown({"a": [b"x" * 1000, "y" * 1000, 10**5000]})) < 300
    assert shown([10**5000]) == "[an integer of 16610 bits]"


def test_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_pickles, "MAX_INSTRUCTIONS", 1000)
    assert load(b"N0" * 499 + b"N.") is None
    assert refusal(lambda: load(b"N0" * 500 + b"N.")).startswith("it has more than 1000 instructions")


COPYING: dict[str, tuple[bytes, bytes]] = {
    "bytes": (b"c_codecs\nencode\nq\x00" + text("a" * 1_000_000) + b"q\x01" + text("latin1") + b"q\x02", b"h\x02\x86"),
    "size": (b"ctorch\nSize\nq\x00](" + b"K\x01" * 200_000 + b"eq\x01", b"\x85"),
    "mapping": (b"ccollections\nOrderedDict\nq\x00](" + b"K\x00N\x86" * 50_000 + b"eq\x01", b"\x85"),
}
"""A function and a large argument of it, and what makes the tuple of arguments of a call."""


@pytest.mark.parametrize("name", COPYING)
def test_copies_of_one_argument_are_counted(name: str, tmp_path: Path) -> None:
    argument, arguments = COPYING[name]
    path = tmp_path / "weights.pt"

    def read(number: int) -> None:
        calls = (b"h\x00h\x01" + arguments + b"R") * number
        path.write_bytes(zip_file(b"\x80\x02" + argument + b"(" + calls + b"t."))
        open_checkpoint(path)

    read(2)  # as many as an honest pickle may have
    tracemalloc.start()
    with pytest.raises(WeightFileError, match="more than 2000000 instructions, or elements that they copy"):
        read(3000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 400_000_000, "a copy for each call would take gigabytes"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (text("a" * 1001) + b"q\x00" + text("b") + b"\x93.", "names a class by more than 1000 characters"),
        (b"}\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000 + b"Ns.", "a number of 39993 bits as a key"),
        (b"}(" + b"N" * 17 + b"tNs.", "a key of 17 parts, more than 16"),
        (b"}\x8a\x08" + b"\x01" * 8 + b"\x85Ns.", ""),
    ],
)
def test_names_and_keys_have_limits(data: bytes, message: str) -> None:
    if message:
        assert message in refusal(lambda: load(data))
    else:
        assert load(data) == {(0x0101010101010101,): None}


@pytest.mark.parametrize("opening", [b"]", b"}", b")", b"csome\nthing\n)R"])
def test_deep_nesting_takes_no_stack(opening: bytes) -> None:
    closing = {b"]": b"a", b"}": b"s", b")": b"\x85"}.get(opening, b"b")
    key = b"K\x00" if opening == b"}" else b""
    nested = b")" + b"\x85" * 200_000 if opening == b")" else (opening + key) * 200_000 + b"N" + closing * 200_000
    load(nested + b".")  # and is thrown away again


# ------------------------------------------------------------ valid content


class Thing:
    """Is not found by its name."""

    def __init__(self) -> None:
        self.size = 3


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_and_placeholders(protocol: int) -> None:
    value = {"a": [1, (2.5, None), "x" * 300], "b": OrderedDict(k=b"raw"), "c": Namespace(width=8), 3: True}
    if protocol < 2:  # objects are then made by copyreg, which nothing of today needs
        value.pop("c")
    read = load(pickle.dumps(value, protocol))
    if protocol >= 2:
        space = read.pop("c")
        assert isinstance(space, Placeholder)
        assert (space.name, space.attributes) == ("argparse.Namespace", {"width": 8})
        value.pop("c")
    assert read == value
    assert type(read["b"]) is OrderedDict


def test_types_become_references() -> None:
    read = load(pickle.dumps([dict, OrderedDict, str], 2))
    assert all(isinstance(value, Reference) for value in read)
    assert [value.name for value in read] == ["__builtin__.dict", "collections.OrderedDict", "__builtin__.unicode"]


def test_requested_names_are_listed() -> None:
    _, names = load_objects(io.BytesIO(b"csome\nThing\n0N."), 100)
    assert names == {"some.Thing"}


def test_the_file_position_is_after_the_pickle() -> None:
    file = io.BytesIO(pickle.dumps([1], 2) + b"rest")
    load_objects(file, 100)
    assert file.read() == b"rest"
