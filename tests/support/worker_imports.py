"""What workers of `World` import before anything else: once, in the process that they fork from."""

import gc
import importlib

from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

install_cpu_backend()
importlib.import_module("megatron_eso.training.job")  # torch, megatron, and most of what tests need
gc.freeze()  # what is imported need not be looked at by the collections after each call
