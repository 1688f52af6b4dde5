"""Starts ranks as forks of a process that has imported everything, which takes a rank of `torchrun` some seconds.

A job is a line of JSON: script, arguments, world size, the file for each of stdout and stderr, and a limit in seconds.
The answer is a line with the exit code: 0, or that of the first rank that failed, after which the others are ended.
Without a world size it is one process in a session of its own, and a signal that ended it is a negative code. What is
not done in time is ended, and the answer is `LATE`.
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
from types import FrameType
from typing import Any, NoReturn

GRACE_SECONDS = 10.0
LATE = "late"


def main() -> None:
    import evaluation  # noqa: F401, PLC0415  (what the ranks find imported)
    import tests.helpers.worker  # noqa: F401, PLC0415
    import train  # noqa: F401, PLC0415

    signal.signal(signal.SIGALRM, be_late)
    for line in sys.stdin:
        job = json.loads(line)
        print(run_alone(job) if job["world_size"] is None else run_ranks(job), flush=True)


def be_late(*_: int | FrameType | None) -> None:
    raise TimeoutError


def run_alone(job: dict[str, Any]) -> int | str:
    pid = fork(job, 0, 0)
    try:
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        os.killpg(pid, signal.SIGKILL)  # with what it has started
        os.waitpid(pid, 0)
        return LATE
    return code


def run_ranks(job: dict[str, Any]) -> int | str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork(job, rank, port) for rank in range(job["world_size"])]
    code = 0
    try:
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        while ranks and not code:
            pid, status = os.wait()
            if pid in ranks:
                ranks.remove(pid)
                code = abs(os.waitstatus_to_exitcode(status))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        end(ranks)
        return LATE
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
