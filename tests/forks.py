"""Processes that are forked from one which has imported Python, torch and this package.

    process = fork(function, *arguments, log=tmp_path / "log")

A start takes a tenth of a second, and that of a new Python three seconds.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["rsa_fast.cli", "rsa_fast.training.engine"])


def fork(function: Callable, *arguments: object, log: Path) -> ForkServerProcess:
    """Start `function` of one thread in a process of its own, whose output goes to `log`."""
    process = SERVER.Process(target=call, args=(log, function, *arguments))
    process.start()
    return process


def call(log: Path, function: Callable, *arguments: object) -> None:
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)
