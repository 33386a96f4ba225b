"""A model by its name on the hub: downloaded once, found again, refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import COMMIT, hub_of, lay_out
from support.patience import patience

from megatron_taopd.config.load import load
from megatron_taopd.formats import hub
from megatron_taopd.preflight.models import with_model_directories

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_pair"


def model(name: str) -> dict[str, bytes]:
    """A repository of one of the tiny models, with what is not needed of it."""
    files = {path.name: path.read_bytes() for path in (TINY / name).iterdir()}
    return files | {
        "README.md": b"# A model", "pytorch_model.bin": b"once more", "onnx/model.onnx": b"again"
    }  # fmt: skip


def config_of(directory: Path, student: str) -> Path:
    """A configuration with this student and the tiny teacher."""
    path = directory / "config.yaml"
    path.write_text(
        f"run: {{dir: runs}}\nstudent: {{path: {student}}}\nteacher: {{path: {TINY}/teacher}}\n"
        f"data: {{prompts: {TINY}/train.jsonl, max_prompt_tokens: 64}}\n"
        "rollout: {max_new_tokens: 32}\n"
    )
    return path


WORK = """
import json, sys
from megatron_taopd import cli
from megatron_taopd.config.load import load
from megatron_taopd.preflight.models import with_model_directories
path, plan, *names = sys.argv[1:]
status = cli.main(["plan", path, "--gpus", "1", "--json", plan])
print(json.dumps(["plan", status]))
for name in names:
    try:
        found = with_model_directories(load(path, [f"student.path={name}"])).student.path
    except ValueError as error:
        found = str(error)
    print(json.dumps([name, found]))
"""


@pytest.mark.slow
def test_a_plan_needs_the_description_and_a_run_the_weights_once(tmp_path):
    """In another process, since the hub's library reads HF_ENDPOINT when it is imported."""
    names = ["some/student", f"some/student@{COMMIT}", "some/studnet", "some/empty"]
    repositories = {"some/student": model("student"), "some/empty": {"README.md": b"# Nothing"}}
    path = config_of(tmp_path, "some/student")
    with hub_of(repositories, "models") as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", WORK, path, tmp_path / "plan.json", *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True,
                              timeout=patience(90))  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("[")]
    found = dict(map(json.loads, printed))
    snapshot = tmp_path / "home" / "hub" / "models--some--student" / "snapshots" / COMMIT
    assert found["plan"] == 0 and (tmp_path / "plan.json").exists()
    assert found["some/student"] == found[f"some/student@{COMMIT}"] == str(snapshot)
    files = model("student")
    needed = {*files} - {"pytorch_model.bin", "onnx/model.onnx"}
    assert {path.name for path in snapshot.iterdir()} == needed
    for name in needed:
        assert (snapshot / name).read_bytes() == files[name]
    fetched = [path.rpartition("/")[2] for path in server.asked if "/resolve/" in path]
    weights = fetched.index("model.safetensors")
    assert "config.json" in fetched[:weights] and "config.json" not in fetched[weights:]
    assert found["some/studnet"].startswith("student.path: some/studnet: http")
    assert "answers 404; is that the right name" in found["some/studnet"]
    assert found["some/studnet"].endswith("(it is no directory here)")
    assert "without config.json" in found["some/empty"]


def test_a_cache_serves_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = lay_out(tmp_path / "hub", "models--some--student", model("student"))
    hub.model_directory.cache_clear()
    config = load(config_of(tmp_path, "some/student@main"))
    assert config.student.path == "some/student@main"
    assert with_model_directories(config).student.path == str(snapshot)
    with pytest.raises(ValueError, match="some/other: HF_HUB_OFFLINE is set, and the"):
        with_model_directories(load(config_of(tmp_path, "some/other")))
    hub.model_directory.cache_clear()


def test_a_directory_comes_before_the_hub(tmp_path):
    """Also one with a name that the hub could have; what neither can be is refused."""
    (tmp_path / "some" / "student").mkdir(parents=True)
    config = load(config_of(tmp_path, "some/student"))
    assert config.student.path == str(tmp_path / "some" / "student")
    assert with_model_directories(config) == config
    for path in ("./student", "one/two/three", "student"):
        absolute = os.path.abspath(tmp_path / path)
        config = load(config_of(tmp_path, path))
        assert config.student.path == absolute
        with pytest.raises(ValueError) as error:
            with_model_directories(config)
        assert str(error.value).startswith(f"student.path: {absolute}: no such directory; give a ")
