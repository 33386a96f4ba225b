"""What a person sees of the package's log lines, by level and rank."""

import io
import logging
import warnings
from contextlib import redirect_stdout

import pytest

from megatron_taopd.monitoring import logs

logger = logging.getLogger("megatron_taopd.some.module")


@pytest.fixture(autouse=True)
def as_before():
    """Leave the package's logger as it was."""
    package = logging.getLogger(logs.PACKAGE)
    level, handlers = package.level, package.handlers
    yield
    package.setLevel(level)
    package.handlers = handlers


def say_all():
    logger.debug("a detail")
    logger.info("resuming after step %d", 3)
    logger.warning("the disk is full")
    logger.error("no such file")
    logger.error("rollout.n: 0; at least 1", extra=logs.OF_THE_RUN)


@pytest.mark.parametrize(
    "rank, ranks, out, err",
    [
        (
            0,
            1,
            "resuming after step 3\n",
            "warning: the disk is full\nerror: no such file\nerror: rollout.n: 0; at least 1\n",
        ),
        (
            0,
            2,
            "resuming after step 3\n",
            "warning on rank 0: the disk is full\nerror on rank 0: no such file\n"
            "error: rollout.n: 0; at least 1\n",
        ),
        (
            1,
            2,
            "",
            "warning on rank 1: the disk is full\nerror on rank 1: no such file\n"
            "error: rollout.n: 0; at least 1\n",
        ),
    ],
)
def test_rank_0_tells_and_what_goes_wrong_names_its_rank(
    capsys, monkeypatch, rank, ranks, out, err
):
    logs.set_up(rank=rank, ranks=ranks)
    say_all()
    assert capsys.readouterr() == (out, err)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    logs.set_up()  # once more: as torchrun says, and each line still comes once
    say_all()
    assert capsys.readouterr() == (out, err)


def test_the_level_comes_from_the_caller_or_the_environment(capsys, monkeypatch):
    monkeypatch.setenv(logs.LEVEL, "Warning")
    logs.set_up()
    say_all()
    assert capsys.readouterr().out == ""
    logs.set_up("debug")
    say_all()
    assert capsys.readouterr().out == "a detail\nresuming after step 3\n"
    monkeypatch.setenv(logs.LEVEL, "loud")
    with pytest.raises(
        ValueError, match=r"^TAOPD_LOG_LEVEL: loud; it has to be one of debug, info"
    ):
        logs.set_up()


def test_lines_go_to_what_stdout_is_when_they_come(capsys):
    logs.set_up()
    with redirect_stdout(io.StringIO()) as here:
        logger.info("100%")
    assert here.getvalue() == "100%\n" and capsys.readouterr().out == ""


def test_a_root_logger_that_a_library_configures_shows_no_line_twice(capsys):
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        logs.set_up()
        logger.info("once")
    finally:
        logging.getLogger().removeHandler(root)
    out, err = capsys.readouterr()
    assert out + err == "once\n"


@pytest.mark.parametrize("level, shown", [("info", 1), ("debug", 3)])
def test_optional_libraries_are_missed_in_silence(level, shown):
    """As Megatron says so, and beside another warning, which is not silenced."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logs.set_up(level)
        for text in (
            "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
            "Apex is not installed. Falling back to Torch Norm",
            "Apex is installed, and something is wrong",
        ):
            warnings.warn(text, stacklevel=1)
    assert len(said) == shown and "something is wrong" in str(said[-1].message)
