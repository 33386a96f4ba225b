import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks and test workers share cores

import torch
from hypothesis import settings
from ranks import close_pools

torch.set_num_threads(1)
# The same examples on every run, and no verdict by the clock of a busy machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_sessionfinish():
    close_pools()
