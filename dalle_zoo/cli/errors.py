"""Errors of the command: every exception becomes one line that says what happened and what to do."""

from __future__ import annotations

import dis
import re
import traceback
from types import TracebackType

from dalle_zoo.files import is_disk_full
from dalle_zoo.hub_errors import exception_chain, hide_secrets

USER, FAULT = 2, 1
"""Exit statuses: of an error that the user can act on, and of one that this package did not expect."""
OURS = ("dalle_zoo", "dalle_zoo_eval")
MOST_CHARACTERS = 300
"""Length at which the message of an unexpected error is truncated."""


class UserError(Exception):
    """A mistake of the user. The message says what was expected, what was given and what to do."""


def check_device(name: str) -> None:
    """Raises `UserError` unless PyTorch can compute on the device."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA raise AssertionError
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): use cpu, or cuda with a GPU") from None


def explain(error: Exception) -> tuple[str, int]:
    """Returns the message of an exception for people, and the exit status.

    Messages that this package wrote are returned as they are. Frequent errors of Python and of libraries are
    explained. Any other exception is reported as unexpected.
    """
    from_system = isinstance(error, OSError) and error.strerror is not None
    if isinstance(error, UserError | ImportError) or (_is_deliberate(error) and not from_system):
        return hide_secrets(str(error)), USER
    for explained in (_of_system(error), _of_memory(error), _of_contents(error)):
        if explained is not None:
            return hide_secrets(explained), USER
    text = f"unexpected {type(error).__name__}: {_one_line(error)}"
    return hide_secrets(f"{text}. Run the command again with --debug, and report what it prints"), FAULT


def debug_text(error: Exception) -> str:
    """Returns the traceback of an exception, without secrets."""
    return hide_secrets("".join(traceback.format_exception(error)))


def _is_deliberate(error: Exception) -> bool:
    """Returns whether a ``raise`` statement of this package raised the exception, so that its message is ours.

    An exception that Python or a library raised inside a call from our code is not: its message is not written for
    users.
    """
    trace: TracebackType | None = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and module.partition(".")[0] in OURS


def _of_system(error: Exception) -> str | None:
    """Message for an error of the operating system, with the file that it concerns."""
    full = next((each for each in exception_chain(error) if is_disk_full(each)), None)
    if full is not None:
        file = _final(getattr(full, "filename", None) or "a file")
        return f"{file} cannot be written: no space left on the disk. Free some space, then run the same command again"
    if "inline_container" in str(error) or "PytorchStreamWriter failed writing" in str(error):
        return f"a file cannot be written ({_one_line(error)}): check the free space of the disk"
    if "home directory" in str(error):  # `Path.home` raises RuntimeError
        return f"the home directory of this user is unknown ({_one_line(error)}): set the variable HOME"
    if not isinstance(error, OSError):
        return None
    if error.strerror is None:
        return f"{type(error).__name__}: {_one_line(error)}"
    names = [_final(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' and '.join(names)}: {error.strerror}" if names else error.strerror


def _final(path: object) -> str:
    """Returns the place of a file that was to be moved out of a workspace (`dalle_zoo.workspaces`)."""
    return re.sub(r"/\.([^/]+)\.writing/[0-9a-f]+(?=/|$)", r"/\1", str(path))


def _of_memory(error: Exception) -> str | None:
    """Message for a lack of memory, which PyTorch reports as `RuntimeError` on CPUs."""
    text = _one_line(error)
    lacks = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not (lacks or "not enough memory" in text or "can't allocate memory" in text):
        return None
    return f"not enough memory{f' ({text})' if text else ''}: use a smaller batch or a smaller model"


def _of_contents(error: Exception) -> str | None:
    """Message for a file whose contents are damaged or of another kind."""
    kind, text = type(error).__name__, _one_line(error)
    if kind == "SafetensorError":
        return f"weights in safetensors cannot be read or written ({text}): copy or download them again"
    if kind in ("UnpicklingError", "BadZipFile"):
        return f"a file of weights is damaged or of another kind ({text}): copy or download it again"
    if isinstance(error, UnicodeDecodeError):
        return f"a text file is not UTF-8 ({text}): save it as UTF-8"
    if isinstance(error, RecursionError):
        return f"an input is nested too deeply ({text}): check the files and values that were given"
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
