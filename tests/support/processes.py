"""Ending processes as a crash of the machine would: all at once, without a word."""

import contextlib
import subprocess

import psutil

HANG_SECONDS = 600.0
"""A deadline that only a hang reaches, on a machine however busy; no verdict depends on it."""


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """`kill -9` of a process and of everything that it has started."""
    root = psutil.Process(process.pid)
    doomed = [*root.children(recursive=True), root]
    for each in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(doomed)
