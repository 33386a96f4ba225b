"""Take the picture of the README: a run's report.html, abridged, in headless Chromium.

    bash examples/quickstart.sh train.steps=100 eval.every=20 run.dir=runs/picture
    python tools/report_picture.py runs/picture --out docs/images/report.png

Needs playwright (`pip install -e '.[dev]'`) and a Chromium or Chrome on the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main(arguments: list[str] | None = None) -> int:
    """Take the picture that the arguments ask for; 2 and one line if that cannot be done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a run, which has a report.html")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    parser.add_argument("--charts", type=int, default=2, help="so many of them stay in the picture")
    parser.add_argument("--samples", type=int, default=4, help="likewise, of each section")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    options = parser.parse_args(arguments)
    try:
        take(
            options.run / "report.html",
            options.out,
            options.charts,
            options.samples,
            options.scheme,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def take(report: Path, out: Path, charts: int, samples: int, scheme: str) -> None:
    """Write a picture of a page, 1200 wide, with its first charts and samples and what is above.

    Raises:
        ValueError: there is no such page, playwright or browser.
    """
    if not report.is_file():
        raise ValueError(f"{report}: no such file; a run writes it at its end")
    try:
        from playwright.sync_api import sync_playwright  # optional
    except ImportError as error:
        raise ValueError("playwright: not installed; pip install playwright") from error
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ValueError(f"browser: none of {', '.join(BROWSERS)} is on the path; install one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = running.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
        page.goto(report.resolve().as_uri())
        for kind, most in (("figure", charts), ("article", samples)):
            page.add_style_tag(content=f"{kind}:nth-of-type(n + {most + 1}) {{ display: none; }}")
        page.add_style_tag(content=".charts ~ * { display: none; }")
        page.screenshot(path=out, full_page=True)
        running.close()


if __name__ == "__main__":
    sys.exit(main())
