"""The users' paths are run by CI, each of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
SHARED = {"steps"}  # what the scripts have in common


def test_ci_runs_every_users_path():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {step.get("run") for job in jobs.values() for step in job["steps"]}
    assert "make users" in commands
    recipe = (ROOT / "Makefile").read_text().split("\nusers:")[1].split("\n\n")[0]
    scripts = {path.stem for path in (ROOT / "tests" / "users").glob("*.sh")} - SHARED
    assert scripts == {"laptop", "cluster", "mistakes"}
    assert all(name in recipe for name in scripts) and "users/$$user.sh || exit 1" in recipe


def test_every_users_path_is_a_script():
    for path in (ROOT / "tests" / "users").glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)
