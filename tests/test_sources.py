"""What `data.prompts` can name: formats, lists and weights, directories of `datasets`, the hub."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from support.hub import COMMIT, hub_of, lay_out
from support.patience import patience
from transformers import AutoTokenizer

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data import hub
from megatron_taopd.data.prompts import PromptStream, drawn_from, load_prompts, prompt_order
from megatron_taopd.data.records import CHUNK, content_of, read_records
from megatron_taopd.data.sources import files_of, sources_of, with_paths, written

ROOT = Path(__file__).parent.parent
ASKS = [{"prompt": f"Sam has {n} eggs . ?", "answer": n} for n in range(7)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_pair" / "student")


def lines(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def put(path: Path, records) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines(records))
    return str(path)


# ----------------------------------------------------------------------------------------- formats


def save_to_disk(directory: Path, records, shards: int = 1) -> Path:
    """As `datasets` 5.2 leaves a directory: streams of Arrow, and which they are."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(records[i::shards])
        with pa.ipc.new_stream(directory / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (directory / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    return directory


def test_every_format_has_the_same_records(tmp_path):
    array = json.dumps(ASKS, indent=2).encode()
    files = {
        "a.jsonl": lines(ASKS),
        "b.json": lines(ASKS),
        "c.json": array,
        "d.json.gz": gzip.compress(array),
        "e.jsonl.gz": gzip.compress(lines(ASKS)),
        "f.json": b"\xef\xbb\xbf \n" + array + b"\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(ASKS), tmp_path / "g.parquet")
    for name in (*files, "g.parquet"):
        assert [record for _, record in read_records(tmp_path / name)] == ASKS, name
    places = [where for where, _ in read_records(tmp_path / "c.json")]
    assert places[4] == f"{tmp_path}/c.json row 5"


def test_an_array_is_read_in_pieces_wherever_they_end(tmp_path):
    """Records of all lengths around a piece's, one of them longer than several."""
    records = [{"prompt": 'ä\\"]}' * n, "n": n} for n in (1, CHUNK // 12, 3, CHUNK, 2, 77_777)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert [record for _, record in read_records(path)] == records


def test_a_directory_of_datasets_is_its_shards(tmp_path):
    saved = save_to_disk(tmp_path / "saved", ASKS, shards=3)
    found = [record for file in files_of(saved) for _, record in read_records(file)]
    assert found == [*ASKS[0::3], *ASKS[1::3], *ASKS[2::3]]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "saved"]}')
    with pytest.raises(ValueError, match=rf"several splits; give one: .*train, {saved}$"):
        files_of(tmp_path)
    files_of(saved)[1].unlink()
    with pytest.raises(ValueError, match=r"00001-of-00003.arrow: missing; .*state.json names it"):
        files_of(saved)
    with pytest.raises(ValueError, match=r"a directory, and none that save_to_disk .*give a file"):
        files_of(ROOT / "docs")


CUT = gzip.compress(lines(ASKS * 99), mtime=0)[:-20]
PARQUET = pa.BufferOutputStream()
pq.write_table(pa.Table.from_pylist(ASKS * 99), PARQUET)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
UMLAUT = '{"prompt": "für"}\n'
BAD = {
    "null answer": ("a.jsonl", b'{"prompt": "a", "answer": null}', "column 'answer' is nul"),
    "surrogate": ("a.jsonl", b'{"prompt": "\\ud83d", "answer": 1}', "line 1: column 'prompt' has"),
    "surrogate in a role": (
        "a.jsonl", b'{"prompt": [{"role": "\\udc00", "content": "a"}], "answer": 1}',
        "line 1: column 'prompt' has '\\udc00', half a surrogate pair",
    ),
    "surrogate in a column": ("a.jsonl", b'{"\\ud83d": 1}', "no column 'prompt'; columns: \\ud83d"),
    "cut gzip": ("a.jsonl.gz", CUT, "cannot be read after line "),
    "cut gzip, array": ("a.json.gz", gzip.compress(b"[1, " * 99)[:-9], "cannot be read after"),
    "no gzip": ("a.jsonl.gz", lines(ASKS), "Not a gzipped file"),
    "cut parquet": ("a.parquet", PARQUET.getvalue().to_pybytes()[:-30], "fetch the file again"),
    "cut arrow": ("a.arrow", b"\xff\xff\xff\xff\x70", "cannot be read after row 0: "),
    "Latin-1": ("a.jsonl", lines(ASKS[:1]) + UMLAUT.encode("latin-1"), "line 2: not JSON"),
    "Latin-1 array": ("a.json", b'[{"prompt": "a"},' + UMLAUT.encode("latin-1"), "iconv -f LATIN1"),
    "UTF-16": ("a.jsonl", UMLAUT.encode("utf-16"), "line 1: UTF-16; files are UTF-8: iconv "),
    "UTF-16LE": ("a.jsonl", UMLAUT.encode("utf-16-le"), "UTF-16LE; files are UTF-8: iconv "),
    "UTF-16BE": ("a.json", UMLAUT.encode("utf-16-be"), "UTF-16BE; files are UTF-8: iconv"),
    "empty": ("a.jsonl", b"", "no prompt is left: it is empty; give a file with records"),
    "empty array": ("a.json", b"[]", "it is empty"),
    "blank": ("a.json", b"\n \n", "it is empty"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "it is empty"),
    "empty parquet": ("a.parquet", b"", "cannot be read after row 0: "),
    "array cut": ("a.json", json.dumps(ASKS).encode()[:-30], "the array has no end: fetch"),
    "array cut between": ("a.json", b'[{"prompt": "a", "answer": 1},', "row 2: not JSON (Expecti"),
    "array of texts": ("a.json", b'["a"]', "row 1: '\"a\"'; each element of the array is a JSON"),
    "two arrays": ("a.json", b'[{"prompt": "a", "answer": 1}] []', "there is more behind its"),
    "pretty object": ("a.json", b'{\n"prompt": "a"}', "line 1: not JSON (Expecting property"),
    "pointer": ("a.jsonl", POINTER, "a pointer of Git LFS in the place of the file; git lfs pull"),
    "pointer for parquet": ("a.parquet", POINTER, "a pointer of Git LFS"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_with_its_place(tmp_path, tokenizer, kind):
    name, content, why = BAD[kind]
    (tmp_path / name).write_bytes(content)
    section = DataSection(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError) as error:
        load_prompts(str(tmp_path / name), tokenizer, section, "answer")
    line = str(error.value)
    assert line.startswith(str(tmp_path / name)) and why in line, line
    assert "\n" not in line and line.encode()  # it can be printed
    assert not list((tmp_path / "cache").iterdir())  # nothing half is left


# ------------------------------------------------------------------------------- lists and weights


def test_a_list_without_weights_is_read_as_one_file(tmp_path, tokenizer):
    parts = [put(tmp_path / "a.jsonl", ASKS[:4]), put(tmp_path / "b.jsonl", ASKS[2:])]
    whole = put(tmp_path / "all.jsonl", ASKS)
    expected = load_prompts(whole, tokenizer, DataSection())
    found = load_prompts(parts, tokenizer, DataSection())
    assert found.token_ids == expected.token_ids and len(found) == 7
    assert (found.duplicates, found.parts) == (2, ())
    assert load_prompts(parts, tokenizer, DataSection(limit=5)).texts == found.texts[:5]


def test_files_with_weights_keep_to_themselves(tmp_path, tokenizer):
    a, b = put(tmp_path / "a.jsonl", ASKS[:4]), put(tmp_path / "b.jsonl", ASKS[2:] * 2)
    prompts = [{"path": a, "weight": 0.7}, {"path": b, "weight": 0.2}]
    found = load_prompts(prompts, tokenizer, DataSection())
    assert found.parts == ((4, 7), (5, 2)) and found.duplicates == 5
    assert found.texts == [record["prompt"] for record in ASKS[:4] + ASKS[2:]]
    limited = load_prompts(prompts, tokenizer, DataSection(limit=2))
    assert limited.parts == ((2, 7), (2, 2))
    put(tmp_path / "none.jsonl", [])
    with pytest.raises(ValueError, match=r"none.jsonl: no prompt is left: it is empty"):
        load_prompts([prompts[0], {"path": f"{tmp_path}/none.jsonl", "weight": 1}], tokenizer,
                     DataSection())  # fmt: skip


@pytest.mark.parametrize("weights", [(1,), (3, 1), (1, 1), (7, 2), (1, 2, 3), (5, 1, 1, 9)])
def test_each_part_has_exactly_its_share(weights):
    """Counted one by one, in place of the closed form."""
    counts, total = Counter(), sum(weights)
    for position in range(5 * total):
        part, before = drawn_from(position, weights)
        assert before == counts[part]
        counts[part] += 1
        for i, weight in enumerate(weights):
            off = counts[i] - Fraction((position + 1) * weight, total)
            assert abs(off) < len(weights)
            assert off == 0 or (position + 1) % total


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_of_parts_is_epochs_of_each_and_resumes(shuffle):
    parts = ((3, 2), (50, 1))
    drawn = PromptStream(53, 5, shuffle, parts=parts).take(90)
    first = [i for i in drawn if i < 3]
    second = [i - 3 for i in drawn if i >= 3]
    assert (len(first), len(second)) == (60, 30)
    assert first == [i for epoch in range(20) for i in prompt_order(3, epoch, 5, shuffle)]
    assert second == prompt_order(50, 0, 5, shuffle, part=1)[:30].tolist()
    for consumed in (0, 1, 7, 45, 89):
        resumed = PromptStream(53, 5, shuffle, consumed, parts)
        pieces = [*resumed.take(1), *resumed.take(20)]
        assert pieces == PromptStream(53, 5, shuffle, 0, parts).take(consumed + 21)[consumed:]
        assert resumed.consumed == consumed + 21


def test_what_a_list_cannot_be():
    for value, why in (
        ([{"path": "a", "weight": 0}], "weight: 0; it is a number above 0"),
        ([{"path": "a", "weight": float("inf")}], "weight: inf; it"),
        ([{"path": "a", "weight": True}], "weight: True; it"),
        ([{"path": "a", "weight": 1}, "b"], "a weight for each, or for none"),
        ([{"path": "a", "wieght": 1}], "a list of {path, weight}"),
        ([["a"]], "a path, a list of paths"),
        ({}, "a path, a list of paths"),
        ([], "a path, a list of paths"),
    ):
        with pytest.raises(ValueError) as error:
            sources_of(value)
        assert why in str(error.value), value


def test_paths_are_changed_and_addresses_are_not():
    named = ["a", "hf://datasets/o/n"]
    assert with_paths(named, str.upper) == ["A", "hf://datasets/o/n"]
    weighted = [{"path": path, "weight": 1} for path in named]
    assert with_paths(weighted, str.upper)[0] == {"path": "A", "weight": 1}
    assert written(weighted) == written(named) == "a, hf://datasets/o/n"


def test_what_is_in_files_is_known_by_content_and_order(tmp_path):
    a, b = (Path(put(tmp_path / f"{n}.jsonl", ASKS[n:])) for n in (0, 3))
    size, one = content_of([a])
    assert size == len(lines(ASKS)) and len(one) == 64
    assert content_of([a, b]) != content_of([b, a]) != content_of([b])
    moved = a.rename(tmp_path / "moved.jsonl")
    assert content_of([moved]) == (size, one)


# ------------------------------------------------------------------------------------------ the hub

REPO = "someone/asks"
TREE = {
    "README.md": b"# Asks",
    "data/train-00000-of-00002.jsonl": lines(ASKS[:4]),
    "data/train-00001-of-00002.jsonl": lines(ASKS[4:]),
    "data/test-00000-of-00001.jsonl": lines(ASKS[:2]),
    "hard/test.jsonl.gz": gzip.compress(lines(ASKS[5:])),
}


@pytest.fixture
def stand_in():
    with hub_of({REPO: TREE}, "datasets") as server:
        yield server


WORK = """
import json, sys
from megatron_taopd.data.hub import files
from megatron_taopd.data.records import content_of
for address in sys.argv[1:]:
    try:
        found = files(address)
        print(json.dumps([[f.name for f in found], content_of(found)[0]]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_the_hub_is_asked_for_what_is_named_and_its_cache_keeps_it(
    stand_in, tmp_path, monkeypatch, caplog
):
    """Another process, since the hub's library reads HF_ENDPOINT when it is imported."""
    base = f"hf://datasets/{REPO}"
    environment = os.environ | {
        "HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    asked = [
        base, f"{base}@main/test", f"{base}/data/test", f"{base}/hard/test.jsonl.gz", f"{base}/dev",
        "hf://datasets/someone/else", "hf://models/x/y",
    ]  # fmt: skip
    command = [sys.executable, "-c", WORK]
    done = subprocess.run([*command, *asked], env=environment, capture_output=True, text=True,
                          timeout=patience(60), check=True)  # fmt: skip
    train, ambiguous, test, hard, none, unknown, model = map(json.loads, done.stdout.splitlines())
    names = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert train == [names, len(lines(ASKS))]
    assert ambiguous.endswith("several splits; name one behind the data set: data/test, hard/test")
    assert test == [["test-00000-of-00001.jsonl"], len(lines(ASKS[:2]))]
    assert hard == [["test.jsonl.gz"], len(TREE["hard/test.jsonl.gz"])]
    assert "no file or split 'dev'; name one behind the data set: data/test, data/train" in none
    assert "answers 404; is that the right name" in unknown and "\n" not in unknown
    assert model.startswith("hf://models/x/y: no data set; write hf://datasets/OWNER/NAME")
    assert "Fetching 2 files" in done.stderr  # its progress
    fetched = [path for path in stand_in.asked if "/resolve/" in path]
    assert not any("README" in path for path in fetched)

    # The same without a network, from what is in the cache now.
    closed = "http://127.0.0.1:9"
    for name, value in (("ENDPOINT", closed), ("HF_HUB_CACHE", f"{tmp_path}/hub")):
        monkeypatch.setattr(constants, name, value)
    hub.files.cache_clear()
    for offline, why in ((True, "HF_HUB_OFFLINE is set"), (False, f"{closed} does not answer")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        found = hub.files(base)
        assert [[file.name for file in found], content_of(found)[0]] == train
        assert bool(caplog.messages) != offline
        hub.files.cache_clear()
        with pytest.raises(ValueError) as error:
            hub.files(f"{base}@v2")
        line = str(error.value)
        assert f"{why}, and the cache {tmp_path}/hub does not have it; `hf download" in line
    assert (
        caplog.messages[0] == f"{base}: {closed} does not answer; the files in the cache are taken"
    )


def test_a_cache_that_was_laid_out_by_hand_serves_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = f"hf://datasets/{REPO}"
    there = {name: content for name, content in TREE.items() if "train-00001" not in name}
    lay_out(tmp_path, "datasets--" + REPO.replace("/", "--"), there)
    hub.files.cache_clear()
    for address in (f"{base}/data/test", f"{base}@main/data/test", f"{base}@{COMMIT}/data/test"):
        (file,) = hub.files(address)
        assert file.read_bytes() == TREE["data/test-00000-of-00001.jsonl"]
    with pytest.raises(ValueError, match="1 of the 2 files of data/train are there; download it"):
        hub.files(base)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set, and the cache .*; `hf download "):
        hub.files("hf://datasets/someone/else")
    hub.files.cache_clear()


@pytest.mark.parametrize(
    "names, wanted, chosen",
    [
        (["a.jsonl"], "", ["a.jsonl"]),
        (["train.parquet", "validation.parquet"], "", ["train.parquet"]),
        (["main/train.json", "main/test.json"], "test", ["main/test.json"]),
        (["x/train/0000.parquet", "x/train/0001.parquet", "x/test/0000.parquet"], "x/train",
         ["x/train/0000.parquet", "x/train/0001.parquet"]),
        (["train.jsonl", "train.parquet"], "train.jsonl", ["train.jsonl"]),
        (["b/one.csv", "b/two.jsonl.gz"], "b", ["b/two.jsonl.gz"]),
        (["train.jsonl", "train.parquet"], "", "several splits"),
        (["main/train.json", "main/test.json"], "main", "several splits"),
        (["a.jsonl", "b.jsonl"], "", "several splits"),
        (["a.csv"], "", "no files to read"),
    ],
)  # fmt: skip
def test_which_files_a_split_is(names, wanted, chosen):
    if isinstance(chosen, list):
        assert hub.choose(names, wanted, "hf://d") == chosen
    else:
        with pytest.raises(ValueError, match=chosen):
            hub.choose(names, wanted, "hf://d")
