"""Starts ranks as forks of a process that has imported everything, which takes a rank of `torchrun` some seconds.

A job is a line of JSON: script, arguments, world size, and the file for each of stdout and stderr. The answer is a
line with the exit code: 0, or that of the first rank that failed, after which the others are ended. Without a world
size it is one process in a session of its own, and a signal that ended it is a negative code.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

GRACE_SECONDS = 10.0


def main() -> None:
    import evaluation  # noqa: F401, PLC0415  (what the ranks find imported)
    import tests.helpers.worker  # noqa: F401, PLC0415
    import train  # noqa: F401, PLC0415

    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)


def run(job: dict[str, Any]) -> int:
    if job["world_size"] is None:
        return os.waitstatus_to_exitcode(os.waitpid(fork(job, 0, 0), 0)[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork(job, rank, port) for rank in range(job["world_size"])]
    code = 0
    while ranks:
        pid, status = os.wait()
        if pid not in ranks:
            continue
        ranks.remove(pid)
        if status and not code:
            code = abs(os.waitstatus_to_exitcode(status))
            end(ranks)
    return code


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        be_rank(job, rank, port)
    return pid


def end(ranks: list[int]) -> None:
    """Ask ranks to end, and do not wait for long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in ranks:
            os.kill(pid, number)
        until = time.monotonic() + GRACE_SECONDS
        while ranks and time.monotonic() < until:
            ranks[:] = [pid for pid in ranks if os.waitpid(pid, os.WNOHANG)[0] == 0]
            time.sleep(0.05)


def be_rank(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    code = 1
    try:
        for descriptor, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
            opened = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_APPEND)
            os.dup2(opened, descriptor)
        if job["world_size"] is None:
            os.setsid()
            os.environ |= job["variables"]
        else:
            size = str(job["world_size"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = [job["script"], *job["arguments"]]
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end_of_rank:
        code = end_of_rank.code if isinstance(end_of_rank.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
