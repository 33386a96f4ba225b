"""What a configuration says about a run, as numbers: the plan's only view of `Config`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_taopd.config import Config, ParallelSection
from megatron_taopd.config.values import check_layouts
from megatron_taopd.formats.hf import load_config
from megatron_taopd.formats.hf_map import FAMILIES
from megatron_taopd.monitoring.throughput import Devices, devices_of
from megatron_taopd.plan.shapes import Architecture, Grid
from megatron_taopd.preflight import rules


@dataclass(frozen=True)
class Servers:
    """SGLang servers of one model.

    Attributes:
        gpus: of the first node, that the run's own servers run on.
        mem_fraction: of the memory of these.
    """

    replicas: int
    tp: int
    concurrency: int
    gpus: tuple[int, ...]
    mem_fraction: float


@dataclass(frozen=True)
class Workload:
    """A step's tokens. The defaults of `Setup.of` are the longest that the configuration allows.

    Attributes:
        sequences: prompts × samples.
        prompt, response: tokens of each.
        kept: share of response rows that is trained on.
        trained: share of tokens that training runs, after the cuts.
        context: tokens that the teacher reads besides the prompt (`teacher.context_column`).
        references: share of the sequences that are not generated (`rollout.mix`).
    """

    sequences: int
    prompt: int
    response: int
    kept: float
    trained: float = 1.0
    context: int = 0
    references: float = 0.0

    @property
    def generated(self) -> int:
        """Return how many of the sequences are the student's own."""
        return round(self.sequences * (1 - self.references))

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def as_read(self) -> Workload:
        """Return the same step as the teacher's trunk reads it."""
        return replace(self, prompt=self.prompt + self.context, context=0)

    def share(self, grid: Grid, micro_batch_tokens: int) -> Share:
        """Say what the data rank that has most has of this step (`data.batching.plan`)."""
        capacity = micro_batch_tokens // grid.cp
        if grid.cp == 1 or self.length <= capacity // grid.shards * grid.shards:
            sequences = -(-self.sequences // grid.data_ranks)
            together = min(sequences, max(1, capacity // self.length))
            return Share(grid.data_ranks, 1, sequences, together, self.length, self.response)
        padded = -(-self.length // (2 * grid.cp)) * 2 * grid.cp
        sequences = -(-self.sequences // grid.dp)
        together = min(sequences, max(1, micro_batch_tokens // padded))
        rows = max(rows_by_rank(self.length - 1, self.prompt - 1, grid.cp))
        return Share(grid.dp, grid.cp, sequences, together, padded // grid.cp, rows)


@dataclass(frozen=True)
class Share:
    """What a data rank has of a pass over sequences of one length, packed whole or in chunks.

    Attributes:
        ranks: data ranks, or groups of them that share sequences, to which sequences are dealt.
        cp: ranks of such a group; 1: sequences are whole.
        sequences: that it runs, or its part of.
        together: of the fullest micro-batch.
        length, response: tokens and rows of each that are here.
    """

    ranks: int
    cp: int
    sequences: int
    together: int
    length: int
    response: int

    @property
    def rows(self) -> int:
        return self.sequences * self.response

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def micro_batches(self) -> int:
        return -(-self.sequences // self.together)

    @property
    def rows_at_a_time(self) -> int:
        return self.together * self.response

    @property
    def tokens_at_a_time(self) -> int:
        return self.together * self.length


def rows_by_rank(length: int, first: int, cp: int) -> list[int]:
    """Count the rows from position `first` to the end of a sequence that each rank has of it."""
    chunk = -(-length // (2 * cp))
    counts = [max(0, min((k + 1) * chunk, length) - max(k * chunk, first)) for k in range(2 * cp)]
    return [counts[rank] + counts[-1 - rank] for rank in range(cp)]


@dataclass(frozen=True)
class Setup:
    """Models, layouts and the keys that decide on memory and time.

    Attributes:
        teacher, teacher_grid: the grid is None of a served teacher.
        columns_only: the teacher gives its top-K, so that no head of it is here.
        average: the teacher follows a moving average of the student (`teacher.source`).
        weighted: kept rows have weights of their own (`loss.weights`).
        waits: steps after the one that begins a response in which it can still be used
            (`rollout.ahead`, or with `rollout.partial` `max_staleness`).
        keep_cache: responses under way keep their cache when weights come.
        rollout, teacher_servers: None where there are no such servers.
        stream: the teacher reads answers while servers generate others, so that its trunk is on the
            device and its rows gather meanwhile. The in-process engine has finished by then.
        others: of several teachers the same run with each of the others in its place.
    """

    gpus: int
    gpus_per_node: int
    student: Architecture
    student_grid: Grid
    teacher: Architecture
    teacher_grid: Grid | None
    workload: Workload
    longest: int  # tokens of the longest sequence
    longest_response: int  # also of evaluations
    horizon: int  # tokens of the longest response that is trained on
    itemsize: int
    recompute: str
    replay: bool
    replay_memory: int
    micro_batch_tokens: int
    mini_batches: int
    head_memory: int
    k: int
    offload: bool
    columns_only: bool
    average: bool
    weighted: bool
    batch_size: int
    rollout: Servers | None
    teacher_servers: Servers | None
    sync_way: str
    sync_bucket: int
    release_memory: bool
    ahead: int
    waits: int
    keep_cache: bool
    stream: bool
    checkpoint_every: int
    used: Devices
    others: tuple[Setup, ...] = ()

    @property
    def each(self) -> list[Setup]:
        """Return the run with each of its teachers alone."""
        return [replace(self, others=()), *self.others]

    def layouts(self) -> str:
        """Return the layout of each teacher, as a person reads them."""
        return ", ".join(str(setup.teacher_grid or "served") for setup in self.each)

    @property
    def devices(self) -> str:
        """How many devices train and, if servers have some of their own, serve."""
        serve = self.used.apart
        both = f" + {serve} serve = {self.gpus + serve}" if serve else ""
        return f"{self.gpus} train{both}"

    @classmethod
    def of(
        cls,
        config: Config,
        gpus: int,
        gpus_per_node: int = 8,
        prompt_tokens: int | None = None,
        response_tokens: int | None = None,
        trained_share: float = 1.0,
    ) -> Setup:
        """Read all models' config.json, and check that the layouts divide them.

        Args:
            config: of which `config.values.check_sections` has nothing to say.
            prompt_tokens, response_tokens: of the average sequence; None: the longest.

        Raises:
            ValueError: one line with the key, its value and what would be right.
        """
        for key, value in (("--gpus", gpus), ("--gpus-per-node", gpus_per_node)):
            if value < 1:
                raise ValueError(f"{key}: {value}; it has to be at least 1")
        lengths = prompt_tokens, response_tokens, trained_share
        first, *others = (
            cls._of_teacher(config, key, gpus, gpus_per_node, lengths)
            for key in config.each_teacher
        )
        check_layouts(config, gpus, "--gpus")
        return replace(first, others=tuple(others))

    @classmethod
    def _of_teacher(
        cls,
        config: Config,
        key: str,
        gpus: int,
        gpus_per_node: int,
        lengths: tuple[int | None, int | None, float],
    ) -> Setup:
        """Describe a run with one of its teachers, by the key of that."""
        rollout, train, teacher = config.rollout, config.train, config.each_teacher[key]
        prompt_tokens, response_tokens, trained_share = lengths
        served = key in config.served
        student_model = _read_model("student", config.student.path, False)
        teacher_model = _read_model(key, teacher.path, served)
        _, longest_prompt = config.prompt_limit(key)
        horizon = rollout.horizon["end"] if isinstance(rollout.horizon, dict) else rollout.horizon
        horizon = horizon if isinstance(horizon, int) else rollout.max_new_tokens
        horizon = min(horizon, rollout.max_new_tokens)
        workload = Workload(
            rollout.prompts * rollout.samples,
            _length("--prompt-tokens", prompt_tokens, config.data.max_prompt_tokens),
            _length("--response-tokens", response_tokens, horizon),
            1.0 if config.selection.selector == "full" else config.selection.ratio,
            min(trained_share, 1 - config.selection.concentrate),
            max(0, longest_prompt - config.data.max_prompt_tokens),
            (rollout.mix or {}).get("dataset", 0.0),
        )
        prompt = max(config.data.max_prompt_tokens, longest_prompt)
        longest = prompt + rollout.max_new_tokens
        return cls(
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            student=Architecture.of(student_model),
            student_grid=_grid("student", config.student, student_model, gpus),
            teacher=Architecture.of(teacher_model),
            teacher_grid=None if served else _grid(key, teacher, teacher_model, gpus),
            workload=workload,
            longest=longest,
            longest_response=max(rollout.max_new_tokens, config.eval.max_new_tokens or 0),
            horizon=horizon,
            itemsize=4 if train.precision == "fp32" else 2,
            recompute=train.recompute,
            replay=train.schedule == "replay",
            replay_memory=train.replay_memory_mib << 20,
            micro_batch_tokens=train.micro_batch_tokens,
            mini_batches=train.mini_batches,
            head_memory=train.head_memory_mib << 20,
            k=config.selection.k,
            offload=teacher.offload,
            columns_only=served and teacher.form == "topk",
            average=teacher.source == "student_ema",
            weighted=config.loss.weights != "none",
            batch_size=rollout.batch_size,
            rollout=_servers(rollout.servers) if rollout.engine == "sglang" else None,
            teacher_servers=_servers(teacher.servers) if served else None,
            sync_way=rollout.sync.transport,
            sync_bucket=rollout.sync.bucket_mib << 20,
            release_memory=rollout.sync.release_memory,
            ahead=rollout.ahead,
            waits=rollout.max_staleness if rollout.partial else rollout.ahead,
            keep_cache=rollout.sync.cache == "keep",
            stream=rollout.stream and rollout.engine == "sglang",
            checkpoint_every=config.checkpoint.every,
            used=Devices.of(config, gpus, min(gpus, gpus_per_node)),
        )


def _read_model(name: str, path: str, served: bool):
    try:
        hf = load_config(path)
        if served and hf.model_type not in FAMILIES:  # SGLang runs it, but no table has its sizes
            raise ValueError(
                f"model_type {hf.model_type}: a plan needs one of {', '.join(FAMILIES)}"
            )
    except ValueError as error:
        raise ValueError(f"{name}.path: {path}: {error}") from None
    if not served:
        rules.check_model(name, path, hf)
    return hf


def _grid(name: str, section, hf, gpus: int) -> Grid:
    parallel: ParallelSection = section.parallel
    dp = rules.check_grid(name, section.path, parallel, hf, gpus)
    return Grid(parallel.tp, parallel.pp, dp, parallel.sequence, parallel.ep, parallel.cp)


def _length(key: str, given: int | None, longest: int) -> int:
    if given is None:
        return longest
    if not 1 <= given <= longest:
        raise ValueError(f"{key}: {given}; the configuration allows 1 to {longest}")
    return given


def _servers(section) -> Servers:
    if section.urls:
        count = len(section.urls)
        return Servers(count, section.tp, section.concurrency, (), 0.0)
    return Servers(
        section.replicas,
        section.tp,
        section.concurrency,
        devices_of(section),
        section.mem_fraction or SGLANG_MEM_FRACTION,
    )


SGLANG_MEM_FRACTION = 0.85  # what SGLang takes if it is not told
