import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks and test workers share cores

import torch
from ranks import close_pools

torch.set_num_threads(1)


def pytest_sessionfinish():
    close_pools()
