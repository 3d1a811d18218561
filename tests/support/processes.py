"""Processes that are caught at work, and that end as in a crash of the machine: all at once."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable

import psutil

HANG_SECONDS = 600.0
"""A deadline that only a hang reaches, on a machine however busy; no verdict depends on it."""


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """`kill -9` of a process and of everything that it has started."""
    root = psutil.Process(process.pid)
    processes = [*root.children(recursive=True), root]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(processes)


def freeze_when(process: subprocess.Popen[bytes], is_so: Callable[[], object]) -> bool:
    """Stop a process by SIGSTOP at an instant when something is so.

    Returns:
        False where it has ended before it could be stopped.
    """
    while process.poll() is None:
        if is_so():
            process.send_signal(signal.SIGSTOP)
            stopped = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
            while psutil.Process(process.pid).status() not in stopped:
                time.sleep(0.001)
            if is_so():  # still, now that it does not run
                return process.poll() is None
            process.send_signal(signal.SIGCONT)
        time.sleep(0.002)
    return False


WITHOUT_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_eso", "megatron", "checkpoints_conversion"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
"""
"""The beginning of a program that cannot import this package or Megatron-Core."""
