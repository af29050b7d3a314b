"""``dalle-zoo ray``: runs a command that shares its work as tasks of a Ray cluster.

Each task is a process of the command with the rank and the number of all, as under torchrun. Parts of the work are
claimed as there (`dalle_zoo.sharing`), so the files are the same for any number of tasks, tasks that the cluster
starts late find less or nothing to do, and a lost task costs the part that it worked on. Ray starts it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.parser import parser
from dalle_zoo.values import as_integer

SHARING = ("encode", "filter", "overlap", "tokenizer")
"""Commands that share their work through files alone."""
RETRIES = 3
"""How often a lost task is started again."""


class LostError(RuntimeError):
    """A signal ended the command, so that it is worth another try."""


def run_task(rank: int, tasks: int, arguments: list[str], folder: str) -> str:
    """Runs the command in a task, and returns what it prints.

    Args:
        rank: Number of the task.
        tasks: Number of all tasks.
        arguments: The command and its arguments.
        folder: Working directory, which all machines share.

    Raises:
        LostError: A signal ended the command.
        RuntimeError: The command failed; the message is its own.
    """
    share = {"RANK": str(rank), "WORLD_SIZE": str(tasks), "LOCAL_RANK": "0"}  # a task sees its own GPUs only
    done = subprocess.run(
        [sys.executable, "-m", "dalle_zoo", *arguments],
        cwd=folder,
        env={**os.environ, **share},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise LostError(f"signal {-done.returncode} ended task {rank}")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return done.stdout


def ray(arguments: list[str]) -> None:
    """Runs a command as tasks of a Ray cluster."""
    p = parser(
        "ray",
        f"Run {', '.join(SHARING[:-1])} or {SHARING[-1]} as tasks of a Ray cluster, whose machines share a folder.\n"
        "Run it again to resume it.\n\n"
        "  dalle-zoo ray -n 64 --gpus 1 encode data --model dvae --device cuda --out codes",
    )
    p.add_argument("-n", "--tasks", type=int, required=True, help="number of tasks")
    p.add_argument("--cpus", type=float, default=1, help="CPUs that a task reserves [1]")
    p.add_argument("--gpus", type=float, default=0, help="GPUs that a task reserves [0]")
    p.add_argument("--address", help="address of the cluster [RAY_ADDRESS, or this machine]")
    p.add_argument("command", choices=SHARING, metavar="COMMAND", help="command that shares its work")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = p.parse_args(arguments)
    tasks = as_integer("--tasks", options.tasks, least=1)
    try:
        import ray as cluster
    except ImportError as error:
        raise ImportError("dalle-zoo ray needs Ray: pip install 'dalle-zoo[ray]'") from error
    cluster.init(address=options.address, log_to_driver=False)
    try:
        work = cluster.remote(
            num_cpus=options.cpus, num_gpus=options.gpus, max_retries=RETRIES, retry_exceptions=[LostError]
        )(run_task)
        command = [options.command, *options.arguments]
        # Ray does not change the working directory of the driver, and tasks have one of their own.
        started = [work.remote(rank, tasks, command, str(Path.cwd())) for rank in range(tasks)]
        print(cluster.get(started)[0], end="")
    except cluster.exceptions.RayTaskError as error:
        raise UserError(str(error.cause)) from None
    finally:
        cluster.shutdown()
