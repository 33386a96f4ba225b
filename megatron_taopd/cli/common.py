"""What every command does alike: one line for a mistake, `--json FILE`, tables, their width.

Neither torch nor transformers is imported at the top, so that a command can tell a mistake in a
configuration before it takes the seconds that they need.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.table import Table

from megatron_taopd.launch import MISTAKE
from megatron_taopd.monitoring import logs

PIPED_WIDTH = 160  # columns of what is no terminal
FAILURE = "cli: the line that says what is wrong"


class Parser(argparse.ArgumentParser):
    """An argparse parser that refuses in one line, and keeps the lines of a description."""

    def __init__(self, *args: Any, **options: Any):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"formatter_class": plain} | options)

    def error(self, message: str) -> NoReturn:
        """Leave with the one line; argparse itself would print the whole usage above it."""
        refuse(f"{message}; {self.prog} --help has what there is")
        sys.exit(MISTAKE)


def add_json(parser: argparse.ArgumentParser, what: str = "the figures") -> None:
    """Add the option that `write_json` obeys."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write {what} there, too")


def add_template_kwargs(parser: argparse.ArgumentParser) -> None:
    """Add the option that has the variables of the chat templates, as `data.template_kwargs`."""
    parser.add_argument(
        "--template-kwargs", type=_mapping, metavar="YAML",
        help="variables of the chat template, such as '{enable_thinking: false}'",
    )  # fmt: skip


def _mapping(text: str) -> dict[str, Any]:
    """Read a mapping; argparse turns a ValueError into its one line."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def run(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Do a command's work, and return its exit status: 2 if a user's mistake has ended it.

    A mistake (ValueError, OSError) is one line on stderr. Where there is a group of ranks, the
    first that finds one says it, and those that it leaves alone in a collective end silently.
    """
    try:
        logs.set_up()
        check_json(arguments)
        status = work(arguments)
    except (ValueError, OSError) as error:
        if not _in_group() or _objects().comes_first(FAILURE):  # others may have come to it, too
            refuse(str(error))
        return MISTAKE
    except RuntimeError:
        if not _in_group() or not _objects().anyone_was(FAILURE):
            raise
        return MISTAKE  # a rank that had ended left this one alone in a collective
    if _in_group():
        sys.modules["torch.distributed"].destroy_process_group()
    return status


def _in_group() -> bool:
    """Tell whether this process is one of a group of ranks; it is not before torch is imported."""
    torch_distributed = sys.modules.get("torch.distributed")
    return torch_distributed is not None and torch_distributed.is_initialized()


def _objects() -> ModuleType:
    from megatron_taopd.parallel import objects  # it imports torch

    return objects


def refuse(message: str) -> None:
    """Print an error as one line, with its rank where there are several.

    Before there is a group, the ranks of a host have read the same and one of them says it.
    """
    if not _in_group() and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f" on rank {os.environ['RANK']}" if several else ""
    line = " ".join(part.strip() for part in message.splitlines())
    print(f"error{rank}: {line}", file=sys.stderr)


def check_json(arguments: argparse.Namespace) -> None:
    """Raise ValueError if the figures will have no place, before the work is done in vain."""
    if getattr(arguments, "json", None) is None:
        return
    folder = arguments.json.absolute().parent
    out = getattr(arguments, "out", None)  # which the command makes
    if not folder.is_dir() and (out is None or folder != out.absolute()):
        raise ValueError(f"--json: {folder}: no such directory; make it, or give another file")
    if arguments.json.is_dir():
        raise ValueError(f"--json: {arguments.json} is a directory; give a file")


def write_json(path: Path | None, figures: Any) -> None:
    """Write the figures, on rank 0 alone, if a file was given."""
    if path is not None and is_first():
        from megatron_taopd.formats.files import file_written_aside  # it imports torch

        with file_written_aside(path) as aside:
            aside.write_text(json.dumps(figures, indent=2) + "\n")


def is_first() -> bool:
    """Tell whether this is rank 0, which alone prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def open_console() -> Console:
    """Open the console of a command: silent on ranks other than 0, and wide enough in a pipe."""
    console = Console(quiet=not is_first())
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def show(*tables: RenderableType) -> None:
    """Print tables one below the other, on rank 0."""
    console = open_console()
    for table in tables:
        console.print(table)


def as_table(figures: dict[str, Any]) -> Table:
    """Lay out one figure a line: its name in words, sizes in GB, floats with four digits."""
    table = Table(box=SIMPLE, show_header=False)
    for name, value in figures.items():
        if name.endswith("bytes"):
            name, value = name.removesuffix("_bytes"), f"{value / 1e9:.3f} GB"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        table.add_row(name.replace("_", " "), str(value))
    return table


def quiet_transformers() -> None:
    """Silence what transformers prints while it loads a model."""
    import transformers  # it takes seconds

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
