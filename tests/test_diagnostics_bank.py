"""The diagnostic's data: banks that grow whole or not at all, tables against dense float64."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support import dense
from support.patience import patience
from support.ranks import run_ranks
from support.step import row_logits
from transformers import AutoTokenizer

from megatron_taopd.cli import diagnose
from megatron_taopd.config import ServersSection
from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.diagnostics import bank as bank_module
from megatron_taopd.diagnostics.bank import Bank, add_rollouts
from megatron_taopd.diagnostics.engines import local_engine, sglang_engine
from megatron_taopd.diagnostics.table import KS, MEASURES, PLACE, read_table, write_gain
from megatron_taopd.formats.convert import to_megatron
from megatron_taopd.rollout.engine import Sampling

TINY = Path(__file__).parent.parent / "examples" / "tiny_pair"
STUDENT, TEACHER = TINY / "student", TINY / "teacher"
SAMPLING = Sampling(max_new_tokens=12, samples=2)


def add(out, seed=0, prompts=TINY / "test.jsonl", limit=6, student=STUDENT, engine=None, **data):
    engine = engine or partial(local_engine, student=student, seed=seed)
    add_rollouts(out, student, prompts, SAMPLING, seed, engine, DataSection(limit=limit, **data))
    return Bank(out)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return add(tmp_path_factory.mktemp("banks") / "bank")


@pytest.fixture
def own_bank(bank, tmp_path):
    return Bank(shutil.copytree(bank.dir, tmp_path / "bank"))


def files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ------------------------------------------------------------------------------------------- banks


def students_log_probs(batch):
    """[R] float64 of the response tokens, over the ids that stand for a token."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokens = 1 + max(tokenizer.get_vocab().values())
    logits, _, _ = row_logits(STUDENT, STUDENT, batch, tokens)
    return dense.log_probs(logits).gather(1, batch.response_tokens()[:, None])[:, 0]


def test_a_bank_holds_what_the_student_wrote(bank):
    contexts = bank.read(0)
    batch = contexts.batch
    assert batch.num_sequences == 12 and batch.prompts.tolist() == [i // 2 for i in range(12)]
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    lines = (TINY / "test.jsonl").read_text().splitlines()
    asked = [json.loads(line)["prompt"] for line in lines[:6]]
    assert [said[-1]["content"] for said in contexts.messages.values()] == asked
    assert contexts.prompts_for(tokenizer) == contexts.prompts
    want = students_log_probs(batch)
    torch.testing.assert_close(batch.log_probs.double(), want, atol=1e-4, rtol=0)


def test_the_same_call_makes_the_same_bank(bank, tmp_path):
    assert add(tmp_path / "again").fingerprint == bank.fingerprint


def test_another_seed_adds_other_answers_to_the_same_prompts(own_bank, bank):
    grown = add(own_bank.dir, seed=1)
    assert grown.fingerprint != bank.fingerprint
    assert grown.summary() | {"fingerprint": None} == {
        "bank": str(own_bank.dir),
        "fingerprint": None,
        "prompts": 6,
        "sequences": 24,
        "positions": grown.read(0).batch.num_rows + grown.read(1).batch.num_rows,
    }
    first, second = grown.read(0), grown.read(1)
    assert (first.first, second.first) == (0, 12)
    assert first.prompts == second.prompts
    assert first.batch.tokens.tolist() != second.batch.tokens.tolist()
    assert torch.equal(first.batch.tokens, bank.read(0).batch.tokens)


def test_other_prompts_are_numbered_on_and_repeats_asked_once(own_bank, tmp_path):
    lines = (TINY / "test.jsonl").read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([lines[7], lines[8], lines[7]]) + "\n")
    grown = add(own_bank.dir, prompts=other)
    assert grown.read(1).batch.prompts.tolist() == [6, 6, 7, 7]


def test_a_prompt_is_not_answered_twice_with_one_seed(own_bank):
    before = files(own_bank.dir)
    with pytest.raises(ValueError, match=r"seed: 0; .* has answers with it to 6 of the 8 prompts"):
        add(own_bank.dir, limit=8)
    assert files(own_bank.dir) == before


def test_what_an_interrupted_addition_leaves_takes_no_part(own_bank, bank):
    whole = (own_bank.dir / "shard_00000.parquet").read_bytes()
    (own_bank.dir / "shard_00001.parquet").write_bytes(whole[:500])
    (own_bank.dir / "bank.json.incomplete").write_text("{")
    assert Bank(own_bank.dir).fingerprint == bank.fingerprint
    assert add(own_bank.dir, seed=1).read(1).batch.num_sequences == 12


def test_a_damaged_bank_is_refused(own_bank):
    path = own_bank.dir / "shard_00000.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00000.parquet: damaged"):
        own_bank.read(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard_00000.parquet: No such file"):
        own_bank.read(0)
    (own_bank.dir / "bank.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bank.json: damaged"):
        Bank(own_bank.dir)
    with pytest.raises(ValueError, match=r"bank.json: No such file or directory; `bank` makes one"):
        Bank(own_bank.dir / "nowhere")


def with_other_tokens(source, out):
    """A copy of a model whose tokenizer writes one token otherwise."""
    shutil.copytree(source, out)
    path = out / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(content))
    return out


def test_a_bank_is_of_one_tokenizer_and_one_student(own_bank, tmp_path):
    other = with_other_tokens(STUDENT, tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer of .*/student .* .*/other has another one"):
        own_bank.check_tokenizer(Vocabulary.from_pretrained(other), other)
    with pytest.raises(ValueError, match=r"holds token ids of the tokenizer of"):
        add(own_bank.dir, seed=1, student=other)
    with pytest.raises(ValueError, match=r"holds rollouts of .*/student, not of .*/teacher"):
        add(own_bank.dir, seed=1, student=TEACHER)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(max_new_tokens=8, samples=0), "samples: 0; at least 1"),
        (Sampling(max_new_tokens=10**6), "max_new_tokens: 1000000 after the longest prompt"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_made(tmp_path, sampling, message):
    engine = partial(local_engine, student=STUDENT, seed=0)
    with pytest.raises(ValueError, match=message):
        add_rollouts(
            tmp_path / "bank",
            STUDENT,
            TINY / "test.jsonl",
            sampling,
            0,
            engine,
            DataSection(limit=2),
        )
    assert not (tmp_path / "bank").exists()


def test_the_first_sequences_are_those_of_all_shards(own_bank, monkeypatch):
    """A shard has ten, and the second one of the first addition two."""
    monkeypatch.setattr(bank_module, "SEQUENCES_PER_SHARD", 10)
    other = add(own_bank.dir.parent / "other")
    assert [shard["sequences"] for shard in other.shards] == [10, 2]
    grown = add(other.dir, seed=1)
    shards = [grown.read(shard) for shard in range(4)]
    for n in (1, 10, 11, 12, 13, 24):
        found = grown.first(n)
        assert found.first == 0 and found.batch.num_sequences == n
        batches = [shard.batch for shard in shards]
        tokens = [batch.sequence(i) for batch in batches for i in range(batch.num_sequences)]
        assert torch.equal(found.batch.tokens, torch.cat(tokens[:n]))
        log_probs = torch.cat([batch.log_probs for batch in batches])
        assert torch.equal(found.batch.log_probs, log_probs[: found.batch.num_rows])
        assert {*found.messages} == {*found.batch.prompts.tolist()}
    with pytest.raises(ValueError, match=r"other: has 24 sequences; 25 are asked for"):
        grown.first(25)
    mixed = add(other.dir, seed=2, template="plain")
    assert mixed.first(24).template == "auto"
    with pytest.raises(ValueError, match=r"the templates auto and plain rendered its first 25 seq"):
        mixed.first(25)


# ----------------------------------------------------------------------------------------- SGLang


def add_by_sglang(out):
    """On a server of our own, and on the same one again as if it were somebody else's."""
    import httpx
    import torch.distributed as dist

    def engine(**servers):
        section = ServersSection(max_total_tokens=8192, **servers)
        keywords = {"student": STUDENT, "dtype": torch.float32, "logs": out / "servers"}
        return partial(sglang_engine, servers=section, **keywords)

    @contextmanager
    def lasting(*_):  # `add_rollouts` is not its last user
        yield own

    vocabulary = Vocabulary.from_pretrained(STUDENT)
    with engine(start_timeout_s=patience(300))(vocabulary, 100) as own:
        server = own.replicas.all[0].server if own.leads else None
        urls = [server and server.url]
        dist.broadcast_object_list(urls)
        there = engine(urls=(urls[0],), start_timeout_s=0)
        add(out, engine=lasting)
        add(out, seed=1, engine=there)
        if server:
            weights = {"model_path": str(STUDENT), "weight_version": "7"}
            httpx.post(f"{server.url}/update_weights_from_disk", json=weights, timeout=patience(60))
        with pytest.raises(ValueError, match="a server has weights of step 7, which a run gave it"):
            add(out, seed=2, engine=there)
        assert server is None or server.alive
    assert server is None or not server.alive
    with pytest.raises(ValueError, match=r"^engine sglang: http://127.0.0.1:9/model_info: Connect"):
        add(out, seed=2, engine=engine(urls=("http://127.0.0.1:9",), start_timeout_s=0))


def test_sglang_answers_with_the_students_probabilities(tmp_path):
    run_ranks(2, add_by_sglang, tmp_path / "bank", timeout=400)
    bank = Bank(tmp_path / "bank")
    assert [(s["engine"], s["seed"], s["sequences"]) for s in bank.shards] == [
        ("sglang", 0, 12),
        ("sglang", 1, 12),
    ]
    assert bank.read(0).batch.tokens.tolist() != bank.read(1).batch.tokens.tolist()
    batch = bank.first(24).batch
    want = students_log_probs(batch)
    torch.testing.assert_close(batch.log_probs.double(), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://a:1"], "--url, --server-tp: are of --engine sglang"),
        (["--server-tp", "2"], "--url, --server-tp: are of --engine sglang"),
        (["--engine", "sglang", "--url", "http://a:1", "--server-tp", "2"], "--server-tp: 2 with"),
    ],
)
def test_options_of_another_engine_are_refused(tmp_path, arguments, message):
    paths = ["--student", STUDENT, "--prompts", TINY / "test.jsonl", "--out", tmp_path / "bank"]
    parsed = diagnose.parse(["bank", *map(str, paths), *arguments])
    with pytest.raises(ValueError, match=message):
        diagnose.engine_of(parsed)


# ------------------------------------------------------------------------------------------ tables


def contrastive_binary_compatibility(z_s, z_t, k):
    raised = dense.log_probs(z_t).exp() - dense.log_probs(z_s).exp()
    values = []
    pairs = zip(raised.tolist(), dense.topk_ids(z_s, k), dense.topk_ids(z_t, k), strict=True)
    for row, own, teachers in pairs:
        most = max({*own, *teachers}, key=lambda v, row=row: row[v])
        values.append(float(most in own))
    return torch.tensor(values)


def oracle(z_s, z_t, tokens) -> dict[str, torch.Tensor]:
    """Every measure of a table, in float64, as its definition says."""
    log_s, log_t = dense.log_probs(z_s), dense.log_probs(z_t)
    found = {
        "student_entropy": dense.entropy(z_s),
        "teacher_entropy": dense.entropy(z_t),
        "forward_kl": dense.kl(log_t, log_s),
        "reverse_kl": dense.kl(log_s, log_t),
        "student_log_prob": log_s.gather(1, tokens[:, None])[:, 0],
        "teacher_log_prob": log_t.gather(1, tokens[:, None])[:, 0],
    }
    for k in KS:
        pairs = zip(dense.topk_ids(z_s, k), dense.topk_ids(z_t, k), strict=True)
        sets = [({*own}, {*teachers}) for own, teachers in pairs]
        found |= {
            f"D_{k}": dense.disagreement(z_s, z_t, k),
            f"C_{k}": dense.compatibility(z_s, z_t, k),
            f"overlap_{k}": torch.tensor([len(s & t) / k for s, t in sets]),
            f"jaccard_{k}": torch.tensor([len(s & t) / len(s | t) for s, t in sets]),
            f"shared_{k}": dense.compatibility_bound(z_s, z_t, k),
            f"cbc_{k}": contrastive_binary_compatibility(z_s, z_t, k),
        }
    return found


def score_with(*args):
    """Run `score_bank` on a rank; the last two arguments are options and further keywords."""
    from megatron_taopd.diagnostics.score import PairOptions, score_bank
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    *positional, options, keywords = args
    return score_bank(*positional, PairOptions(**options), **keywords)


def score(bank, out, ranks=1, checkpoint=STUDENT, teacher=TEACHER, options=(), **kwargs):
    run_ranks(ranks, score_with, bank.dir, checkpoint, teacher, out, dict(options), kwargs)
    return read_table(out)


def assert_oracle(table, batch, z_s, z_t):
    for name, want in oracle(z_s, z_t, batch.response_tokens()).items():
        got = torch.tensor(table[name].to_numpy()).double()
        torch.testing.assert_close(got, want.double(), atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("ranks", "parallel", "teacher_parallel"),
    [
        (1, (1, 1), (1, 1, 1)),
        (2, (2, 1), (1, 2, 1)),
        (2, (1, 2), (2, 1, 1)),
        (2, (1, 1), (1, 1, 1)),
    ],
    ids=["one rank", "TP2", "PP2", "DP2"],
)
def test_a_table_is_the_oracles_on_every_layout(bank, tmp_path, ranks, parallel, teacher_parallel):
    table, about = score(
        bank, tmp_path / "t.parquet", ranks, options={
            "parallel": parallel, "teacher_parallel": teacher_parallel, "head_memory_mib": 1
        }
    )  # fmt: skip
    assert table.column_names == [*PLACE, *MEASURES]
    assert about["bank"] == bank.fingerprint and json.loads(about["ks"]) == [8, 16, 32]
    assert (about["checkpoint"], about["teacher"]) == (str(STUDENT), str(TEACHER))
    batch = bank.read(0).batch
    place = list(zip(*(table[name].to_pylist() for name in PLACE), strict=True))
    want = [
        (int(batch.prompts[i]), i, t, n, token)
        for i, n in enumerate(batch.response_lengths.tolist())
        for t, token in enumerate(batch.sequence(i)[-n:].tolist())
    ]
    assert place == want
    size = Vocabulary.from_pretrained(STUDENT).size
    z_s, z_t, _ = row_logits(STUDENT, TEACHER, batch, size)
    assert_oracle(table, batch, z_s.detach(), z_t)


def test_a_teacher_with_another_template_reads_its_own_prompts(bank, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(TEACHER, teacher)
    path = teacher / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{% for m in messages %}Sam has {{ m['content'] }}{% endfor %}"
    path.write_text(json.dumps(config))
    (teacher / "chat_template.jinja").unlink(missing_ok=True)
    contexts = bank.read(0)
    size = Vocabulary.from_pretrained(STUDENT).size
    vocab_map = VocabMap(torch.arange(size))
    for reads, prompts in (
        ("own", contexts.prompts_for(AutoTokenizer.from_pretrained(teacher))),
        ("student", None),
    ):
        table, about = score(bank, tmp_path / f"{reads}.parquet", teacher=teacher,
                             teacher_prompt=reads)  # fmt: skip
        z_s, z_t, _ = row_logits(STUDENT, TEACHER, contexts.batch, size, vocab_map, prompts)
        assert about["teacher_prompt"] == reads
        assert_oracle(table, contexts.batch, z_s.detach(), z_t)
    with pytest.raises(ValueError, match=r"its teacher's prompts \(student\) is not that of"):
        write_gain(tmp_path / "own.parquet", tmp_path / "student.parquet", tmp_path / "gain")


def test_a_model_beside_itself(bank, tmp_path):
    table, _ = score(bank, tmp_path / "t.parquet", teacher=STUDENT)
    for k in KS:
        for name, want in (("D", 0), ("overlap", 1), ("jaccard", 1), ("cbc", 1)):
            torch.testing.assert_close(
                torch.tensor(table[f"{name}_{k}"].to_numpy()),
                torch.full((len(table),), float(want)), atol=1e-6, rtol=0,
            )  # fmt: skip
        assert table[f"C_{k}"] == table[f"shared_{k}"]


def test_a_megatron_checkpoint_gives_the_table_of_its_model(bank, tmp_path):
    to_megatron(STUDENT, tmp_path / "megatron")
    of_hf, _ = score(bank, tmp_path / "hf.parquet")
    of_megatron, about = score(
        bank, tmp_path / "m.parquet", 2, checkpoint=tmp_path / "megatron",
        options={"parallel": (1, 2), "teacher_parallel": (1, 2, 1)},
    )  # fmt: skip
    assert about["checkpoint"] == str(tmp_path / "megatron")
    for name in MEASURES:
        torch.testing.assert_close(
            torch.tensor(of_megatron[name].to_numpy()), torch.tensor(of_hf[name].to_numpy()),
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip


def test_a_bank_of_several_shards_is_one_table(own_bank, bank, tmp_path):
    grown = add(own_bank.dir, seed=1)
    table, _ = score(grown, tmp_path / "grown.parquet")
    alone, _ = score(bank, tmp_path / "alone.parquet")
    assert table.slice(0, len(alone)).to_pydict() == alone.to_pydict()
    assert table["sequence"].to_pylist()[-1] == 23
    with pytest.raises(ValueError, match=r"its bank \(\w+\) is not that of"):
        write_gain(tmp_path / "grown.parquet", tmp_path / "alone.parquet", tmp_path / "gain")


def test_a_view_shows_the_likeliest_tokens_of_both_models(bank, tmp_path):
    options = {"parallel": (2, 1), "teacher_parallel": (2, 1, 1)}
    score(bank, tmp_path / "t.parquet", 2, options=options, view=2)
    shown = json.loads((tmp_path / "t.view.json").read_text())["sequences"]
    batch, tokenizer = bank.first(2).batch, AutoTokenizer.from_pretrained(STUDENT)
    assert [view["sequence"] for view in shown] == [0, 1]
    z_s, z_t, _ = row_logits(STUDENT, TEACHER, batch, Vocabulary.from_pretrained(STUDENT).size)
    positions = [position for view in shown for position in view["positions"]]
    assert [p["text"] for p in positions] == [
        tokenizer.decode([token]) for token in batch.response_tokens().tolist()
    ]
    for row, position in enumerate(positions):
        for whose, logits in (("student", z_s), ("teacher", z_t)):
            ids = dense.topk_ids(logits[row : row + 1], 5)[0]
            texts, probabilities = zip(*position[whose], strict=True)
            assert list(texts) == [tokenizer.decode([v]) for v in ids]
            want = dense.log_probs(logits[row : row + 1]).exp()[0, ids].tolist()
            assert list(probabilities) == pytest.approx(want, abs=1e-4)


def refused(*args):
    try:
        score_with(*args)
    except ValueError as error:
        return str(error)


def test_what_does_not_belong_together_is_refused(bank, tmp_path):
    other = with_other_tokens(STUDENT, tmp_path / "other")

    def error(checkpoint, options=(), **kwargs):
        args = bank.dir, checkpoint, TEACHER, tmp_path / "t.parquet", dict(options)
        return run_ranks(1, refused, *args, kwargs)[0]

    assert "another one" in error(other)
    assert "give the directory of one Megatron" in error(tmp_path)
    assert "micro_batch_tokens: 8 is too small" in error(STUDENT, {"micro_batch_tokens": 8})
    assert "has 12 sequences; 13 are asked for" in error(STUDENT, view=13)
    assert not list(tmp_path.glob("t.parquet*"))


def test_gain_is_what_the_forward_kl_has_lost(bank, tmp_path):
    """From the student to the teacher itself: all of it."""
    before, _ = score(bank, tmp_path / "before.parquet")
    score(bank, tmp_path / "after.parquet", checkpoint=TEACHER)
    figures = write_gain(*(tmp_path / f"{n}.parquet" for n in ("before", "after", "gain")))
    table, about = read_table(tmp_path / "gain.parquet")
    assert table.column_names == [*before.column_names, "gain"]
    assert about["after"] == str(TEACHER) and about["checkpoint"] == str(STUDENT)
    gain = torch.tensor(table["gain"].to_numpy())
    torch.testing.assert_close(gain, torch.tensor(before["forward_kl"].to_numpy()))
    assert figures["gain"] == pytest.approx(gain.double().mean().item(), rel=1e-5)
    assert (figures["positions"], figures["prompts"]) == (len(before), 6)

    score(bank, tmp_path / "other.parquet", teacher=STUDENT)
    with pytest.raises(ValueError, match=r"its teacher \(\w+\) is not that of"):
        write_gain(*(tmp_path / f"{n}.parquet" for n in ("before", "other", "gain")))
    pq.write_table(table.select(["gain"]), tmp_path / "strange.parquet")
    with pytest.raises(ValueError, match="not a table that `score` wrote"):
        read_table(tmp_path / "strange.parquet")
