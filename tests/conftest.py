import gc
import os

# Before torch: ranks and test workers share the cores. What is started from here inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():  # a second of each process: see launch.py
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from hypothesis import settings
from support.patience import patience
from support.ranks import close_pools

from megatron_taopd.monitoring import logs

# A third of the time of imports goes on looking for garbage among what stays; see below.
gc.disable()
# Where matplotlib keeps the fonts that it has found: looking for them takes another second.
caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("MPLCONFIGDIR", str(caches / "matplotlib"))
# Of tokenised prompts: as on a machine on which nothing has run before.
CACHE = tempfile.TemporaryDirectory(prefix="taopd-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Whether Triton interprets kernels is settled at its first import, which may be another library's.
if find_spec("triton") and not torch.cuda.is_available():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import triton  # noqa: F401
# The same examples on every run, and no verdict by the clock of a busy machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
logs.set_up()  # tests call what entry points do, without these


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Leave all that was imported and collected alone from now on."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Mark the tests of files that start ranks or servers, by what these files import.

    Files that wait the longest come first, so that no worker has one of them left in the end.
    """
    for item in items:
        ranks, servers, _ = _starts(item)
        if ranks:
            item.add_marker("ranks")
        if servers:
            item.add_marker("sglang")
    items.sort(key=lambda item: (_starts(item)[1], sum(_starts(item))), reverse=True)


def _starts(item) -> tuple[bool, bool, bool]:
    """Tell whether a test's file starts ranks, servers, and other processes."""
    imported = vars(item.module).keys()
    return (
        bool(imported & {"run_ranks", "observe", "observed"}),
        bool(imported & {"serve", "shared_server", "Server", "in_place_of_sglang"}),
        bool(imported & {"run", "finish"}),
    )


def pytest_sessionfinish():
    close_pools()


@pytest.fixture(scope="module")
def browser():
    """Start headless Chromium for the tests of pages, which skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium or Chrome on the path")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=executable, args=["--no-sandbox"], timeout=1e3 * patience(60)
        )
        yield running
        running.close()
