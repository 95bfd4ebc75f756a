"""Processes that begin at once: forked from a server that has imported torch and the programs already.

    run("train.py", "--config", …)        → .returncode, .stdout, .stderr, as `python train.py --config …` has them
    ranks(2, "train.py", …)               the same, of the processes that torchrun would start
    spawn(function, …)                    function(0, …) and function(1, …), as torch.multiprocessing has it
    start("train.py", "--config", …)      → a multiprocessing.Process: .kill(), .join(), .exitcode

Each is a process of its own, with its own environment, that can be killed; only the three seconds of imports are gone.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["prepare", "sample", "train"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


def _program(script, arguments, out, err, cwd, environment):
    os.environ.update(environment)
    os.chdir(cwd)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [str(script), *arguments]
    runpy.run_path(script, run_name="__main__")


def start(script, *arguments, cwd=ROOT, environment=(), out=os.devnull, err=None):
    """A process that runs a script; what it writes is appended to the files `out` and `err` (None: the same)."""
    arguments = [str(argument) for argument in arguments]
    arguments = (str(ROOT / script), arguments, str(out), str(err or out), str(cwd), dict(environment))
    process = SERVER.Process(target=_program, args=arguments, daemon=True)  # ends with pytest, if not before
    process.start()
    return process


def spawn(function, *arguments):
    """function(rank, *arguments) in two processes; what one of them raises is raised here."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def run(script, *arguments, **options):
    return ranks(1, script, *arguments, **options)


def ranks(world, script, *arguments, cwd=ROOT, environment=(), seconds=300):
    """`world` processes that talk to each other; when one fails, the others are ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.TemporaryDirectory() as folder:
        out, err, processes = Path(folder) / "out", Path(folder) / "err", []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} | address | dict(environment)
            processes.append(start(script, *arguments, cwd=cwd, environment=own, out=out, err=err))
        last, waiting = time.monotonic() + seconds, list(processes)
        while waiting and time.monotonic() < last and not any(process.exitcode for process in processes):
            waiting[0].join(0.05)
            waiting = [process for process in waiting if process.exitcode is None]
        code = next((process.exitcode for process in processes if process.exitcode), -1 if waiting else 0)
        for process in waiting:
            process.kill()
            process.join()
        return subprocess.CompletedProcess([script, *arguments], code, out.read_text(), err.read_text())
