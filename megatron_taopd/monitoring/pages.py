"""The environment in which both reports are rendered from their .html, .css and .js files."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_taopd.monitoring.numbers import number, percent, seconds

COMMON = Path(__file__).with_name("templates")


def environment(*directories: Path) -> Environment:
    """Open templates that can extend and include the common ones.

    What is put into them is escaped, unless it is `Markup`. `tojson` is safe inside <script>.

    Args:
        directories: of the templates, in addition to those in this folder.
    """
    templates = Environment(
        loader=FileSystemLoader([*directories, COMMON]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    templates.filters |= {"number": number, "percent": percent, "seconds": seconds}
    return templates
