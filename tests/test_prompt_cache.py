"""Tokenised prompts are kept under a digest of all that they are made of, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from support.patience import patience, wait_for
from support.ranks import run_ranks
from transformers import AutoTokenizer

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data import cache, prompts, records
from megatron_taopd.data.prompts import TeacherReader, load_prompts, tokenised
from megatron_taopd.data.rendering import Renderer
from megatron_taopd.parallel import objects

STUDENT = Path(__file__).parent.parent / "examples" / "tiny_pair" / "student"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{{ ends or '?' }}"


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(STUDENT)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def section(tmp_path):
    return DataSection(cache_dir=str(tmp_path / "cache"))


def put(path: Path, number: int = 5, answer: int = 1) -> str:
    rows = [{"prompt": f"Sam has {n} eggs .", "answer": answer} for n in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@contextmanager
def nothing_is_rendered():
    """Fail where a prompt is read or rendered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renderer, "batch", None)
        patch.setattr(records, "_read_json", None)
        yield


def test_ids_are_those_of_the_renderer_and_come_from_disk_the_second_time(
    tmp_path, tokenizer, section, monkeypatch
):
    """With batches that the file does not fill."""
    monkeypatch.setattr(prompts, "BATCH", 3)
    file = put(tmp_path / "p.jsonl", 8)
    asks = [[{"role": "user", "content": f"Sam has {n} eggs ."}] for n in range(8)]
    expected = [Renderer(tokenizer)(messages) for messages in asks]
    first = load_prompts(file, tokenizer, section, "answer")
    assert first.token_ids == expected and first.messages == asks and first.answers == ["1"] * 8
    assert first.token_ids[-1] == expected[-1] and first.token_ids[2:4] == expected[2:4]
    assert isinstance(first.token_ids.values, np.memmap)
    assert first.token_ids.lengths().tolist() == [*map(len, expected)]
    with pytest.raises(IndexError):
        first.token_ids[8]
    with nothing_is_rendered():
        assert load_prompts(file, tokenizer, section, "answer") == first
        moved = Path(file).rename(tmp_path / "moved.jsonl")
        assert load_prompts(moved, tokenizer, section, "answer") == first


def test_an_entry_is_of_everything_that_it_depends_on(tmp_path, tokenizer, section, monkeypatch):
    """Each change alone gives another entry, and takes nothing from those that are there."""
    file, other = put(tmp_path / "p.jsonl"), put(tmp_path / "q.jsonl", answer=2)
    chat, more, bos = (copy.deepcopy(tokenizer) for _ in range(3))
    chat.chat_template = TEMPLATE + "!"
    more.add_tokens(["eggs ."])
    bos.add_special_tokens({"additional_special_tokens": ["<eggs>"]})
    pins = replace(section, template_kwargs={"ends": "!"})
    nested = {"prompt_column": "a.prompt", "answer_column": "b"}
    same = {"path": file, "weight": 1}
    entries = {
        "plain": tokenised(file, tokenizer, section),
        "content": tokenised(other, tokenizer, section),
        "order": tokenised([other, file], tokenizer, section),
        "other order": tokenised([file, other], tokenizer, section),
        "weights": tokenised([same, {**same, "weight": 2}], tokenizer, section),
        "other weights": tokenised([same, {**same, "weight": 3}], tokenizer, section),
        "answers": tokenised(file, tokenizer, section, "answer"),
        "limit": tokenised(file, tokenizer, replace(section, limit=3)),
        "chat template": tokenised(file, chat, section),
        "tokens": tokenised(file, more, section),
        "special tokens": tokenised(file, bos, section),
        "kwargs": tokenised(file, tokenizer, pins),
        "other kwargs": tokenised(file, tokenizer, replace(section, template_kwargs={"ends": 0})),
        "template": tokenised(file, tokenizer, replace(section, template="plain")),
        "system": tokenised(file, tokenizer, replace(section, system="Eve")),
        "longest": tokenised(file, tokenizer, replace(section, max_prompt_tokens=99)),
        "repeats": tokenised(file, tokenizer, replace(section, deduplicate=False)),
        "a teacher": tokenised(file, tokenizer, section, None, TeacherReader(chat)),
        "its kwargs": tokenised(file, tokenizer, section, None, TeacherReader(chat, {"ends": "."})),
        "answer column": tokenised(file, tokenizer, replace(section, answer_column="b")),
    }
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    entries["format"] = tokenised(file, tokenizer, section)
    monkeypatch.undo()
    monkeypatch.setattr(prompts.tokenizers, "__version__", "0")
    entries["version"] = tokenised(file, tokenizer, section)
    assert len(set(entries.values())) == len(entries)
    nested_file = tmp_path / "n.jsonl"
    row = {"a": {"prompt": "Eve"}, "prompt": "Sam", "b": 1, "answer": 2}
    nested_file.write_text(json.dumps(row))
    nested_section = replace(section, **nested)
    assert load_prompts(nested_file, tokenizer, section).texts == ["Sam"]
    assert load_prompts(nested_file, tokenizer, nested_section).texts == ["Eve"]
    with nothing_is_rendered():
        assert load_prompts(file, tokenizer, section, None, TeacherReader(tokenizer)).dropped == 0


def test_what_is_not_whole_is_made_anew(tmp_path, tokenizer, section):
    file = put(tmp_path / "p.jsonl")
    entry = tokenised(file, tokenizer, section)
    expected = load_prompts(file, tokenizer, section).texts[:]
    for name in ("ids.values", "messages.offsets", "about.json"):
        content = (entry / name).read_bytes()
        for damaged in (content[:-1], b"", None):
            (entry / name).unlink()
            if damaged is not None:
                (entry / name).write_bytes(damaged)
            assert cache.about(entry) is None
            with pytest.raises(ValueError, match=r"data.cache_dir: .* is gone or damaged, which"):
                prompts.open_prompts(entry)
            assert load_prompts(file, tokenizer, section).texts == expected


def test_a_refused_prompt_leaves_no_entry_and_names_itself(tmp_path, tokenizer, section):
    """Behind ones that are good, in the same batch."""
    file = Path(put(tmp_path / "p.jsonl", 3))
    bad = {"prompt": [{"role": "human", "content": "a"}]}
    file.write_text(file.read_text() + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=r"p.jsonl line 4: column 'prompt': message 1 of 1"):
        load_prompts(file, tokenizer, section)
    assert not [*Path(section.cache_dir).iterdir()]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer):
    file, place = put(tmp_path / "p.jsonl"), tmp_path / "file"
    place.touch()
    for directory in (place, Path("/proc/taopd")):
        with pytest.raises(ValueError, match=rf"^data.cache_dir: {directory}: .*; give a dir"):
            load_prompts(file, tokenizer, DataSection(cache_dir=str(directory)))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, section):
    file = put(tmp_path / "p.jsonl")
    batch = Renderer.batch

    def meanwhile(self, conversations):
        Path(file).write_text(Path(file).read_text() + "\n")
        return batch(self, conversations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renderer, "batch", meanwhile)
        with pytest.raises(ValueError, match="changed while it was read; try again"):
            load_prompts(file, tokenizer, section)
    assert not [*Path(section.cache_dir).iterdir()]


def test_the_default_place_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.place(None) == Path("/x/megatron-taopd/prompts")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert cache.place(None) == Path("/home/ann/.cache/megatron-taopd/prompts")
    assert cache.place("/elsewhere") == Path("/elsewhere")


# -------------------------------------------------------------------------------- several processes


def write_and_wait(entry: Path, go: Path) -> None:
    with cache.written(entry) as (aside, about):
        (aside / "ids.values").write_bytes(b"whole")
        about["by"] = os.getpid()
        wait_for(go.exists, patience(60))


def test_of_several_writers_one_wins_and_one_that_is_killed_leaves_no_entry(tmp_path):
    entry, fork = tmp_path / "cache" / "key", get_context("fork")
    go = tmp_path / "go"
    writers = [fork.Process(target=write_and_wait, args=(entry, go)) for _ in range(4)]
    for writer in writers:
        writer.start()
    wait_for(lambda: len([*entry.parent.glob("key.*/ids.values")]) == 4, patience(20))
    os.kill(writers[0].pid, signal.SIGKILL)
    writers[0].join()
    assert cache.about(entry) is None
    go.touch()
    for writer in writers[1:]:
        writer.join()
        assert writer.exitcode == 0
    assert cache.about(entry)["by"] in [writer.pid for writer in writers[1:]]
    (left,) = entry.parent.glob("key.*")  # of the one that was killed
    with cache.written(entry.parent / "other"):
        pass
    assert left.exists()  # it may be another machine's, that still writes
    os.utime(left, (0, 0))
    with cache.written(entry.parent / "another"):
        pass
    assert not left.exists() and cache.about(entry)


def on_nodes_of_two(function, *arguments):
    """On 4 ranks, of which each two share a node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(dist.get_rank() % 2))
        patch.setattr(objects, "SIGN_OF_LIFE_S", 0.2)
        try:
            return function(*arguments)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"


def once(log: str, fails: tuple[int, ...] = ()):
    def work():
        with open(log, "a") as file:
            file.write(f"{dist.get_rank()}\n")
        if dist.get_rank() in fails:
            raise (ValueError if dist.get_rank() == 2 else OSError)("no such thing")
        wait_for(lambda: dist.get_rank() == 0 or len(Path(log).read_text()) == 4, patience(9))
        return f"node of {dist.get_rank()}"

    return objects.once_per_node(work)


def test_work_is_done_once_on_every_node(tmp_path):
    log = str(tmp_path / "log")
    told = run_ranks(4, on_nodes_of_two, once, log)
    assert told == ["node of 0", "node of 0", "node of 2", "node of 2"]
    assert sorted(Path(log).read_text().split()) == ["0", "2"]


@pytest.mark.parametrize(
    "fails, line",
    [((2,), "ValueError: no such thing"), ((0,), "RuntimeError: no such thing")],
)
def test_what_fails_on_one_node_fails_everywhere(tmp_path, fails, line):
    log = str(tmp_path / "log")
    assert run_ranks(4, on_nodes_of_two, once, log, fails) == [line] * 4


def rendered_by(path: str, place: str):
    """How many prompts this rank rendered for a run, and how many it has."""
    from support.observed import TINY

    from megatron_taopd.config import load
    from megatron_taopd.data.texts import open_texts

    batch, count = Renderer.batch, []

    def counted(self, conversations):
        count.extend(conversations)
        return batch(self, conversations)

    overrides = [f"run.dir={place}", f"data.cache_dir={place}", "eval.prompts=null"]
    overrides.append(f"data.prompts={path}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renderer, "batch", counted)
        found = open_texts(load(TINY, overrides))
    return len(count), len(found.prompts)


def test_a_run_tokenises_once_on_a_node_and_all_its_ranks_have_the_prompts(tmp_path):
    file = put(tmp_path / "p.jsonl", 6)
    seen = run_ranks(2, rendered_by, file, str(tmp_path / "cache"))
    assert seen == [(6, 6), (0, 6)]
    assert run_ranks(2, rendered_by, file, str(tmp_path / "cache")) == [(0, 6), (0, 6)]


def rendered_by_node(directory: str):
    name = "a.jsonl" if dist.get_rank() < 2 else "b.jsonl"
    return rendered_by(f"{directory}/{name}", f"{directory}/cache")


def test_nodes_that_read_other_prompts_are_told_apart(tmp_path):
    put(tmp_path / "a.jsonl", 6)
    put(tmp_path / "b.jsonl", 7)
    seen = run_ranks(4, on_nodes_of_two, rendered_by_node, str(tmp_path))
    line = "ValueError: data.prompts or eval.prompts: rank 2 reads others than rank 0; the same"
    assert all(str(each).startswith(line) for each in seen), seen
