"""Every key of a run's configuration: its type, its default, what it means, what it may be.

These frozen dataclasses are the whole configuration. They import nothing of the package, so that
anything may be given a section as it is. `load.py` reads them from YAML, `values.py` compares them
with each other and with the files, `preflight/check_config` with the models; docs/configuration.md
is made of what stands here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import MISSING

# The keys of step.selection.SELECTORS, and step.loss.LOSSES.
Selector = Literal[
    "full", "random", "prefix", "prefix_share", "entropy", "divergence", "compatibility", "tip",
    "teachability", "teachability_entropy", "q3", "q3_high_c", "q3_high_dl", "q3_low_dl",
    "q3_high_di",
]  # fmt: skip
# Those whose priorities are ≥ 0, so that their sum says what a set of rows is worth.
_WITHOUT_MASS = ("full", "random", "prefix", "prefix_share", "q3_low_dl")
CONCENTRATES = tuple(name for name in get_args(Selector) if name not in _WITHOUT_MASS)
Loss = Literal["reverse_kl", "forward_kl", "jsd", "skewed_reverse_kl", "sampled_token"]


@dataclass(frozen=True)
class Bounds:
    """The numbers that a key may be; they are finite in any case.

    Attributes:
        at_least, above, at_most, below: the ends of the interval.
        or_zero: 0 is allowed, too, and switches something off.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    or_zero: bool = False

    def hold(self, value: float) -> bool:
        """Tell whether a number is allowed."""
        if self.or_zero and value == 0:
            return True
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self == NOT_NEGATIVE:
            return "0 or more"
        least = self.at_least if self.above is None else self.above
        most = self.at_most if self.below is None else self.below
        if most is not None:
            if self.above is not None and self.below is not None:
                return f"strictly between {least:g} and {most:g}"
            left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"in {left}{least:g}, {most:g}{right}"
        words = "at least" if self.above is None else "more than"
        return f"{'0 or ' if self.or_zero else ''}{words} {least:g}"


COUNT = Bounds(at_least=1)
NOT_NEGATIVE = Bounds(at_least=0)
POSITIVE = Bounds(above=0)
SHARE = Bounds(above=0, at_most=1)
INSIDE = Bounds(above=0, below=1)
DECAY = Bounds(at_least=0, below=1)
PORT = Bounds(at_least=1, at_most=65535)


def key(default: Any, doc: str, bounds: Bounds | None = None, kind: str | None = None) -> Any:
    """Declare a key of a section.

    Args:
        default: MISSING where the user has to give a value.
        doc: what it means; Markdown, one or more sentences.
        bounds: of a number; None allows every value of its type.
        kind: what its page calls the type, where the annotation does not say it.
    """
    return field(default=default, metadata={"doc": doc, "bounds": bounds, "kind": kind})


@dataclass(frozen=True)
class Growth:
    """A horizon that grows: what `rollout.horizon` is as a mapping.

    Attributes:
        start, end: the longest response of the first step, and of step `steps` and all after it.
        growth: linear adds the same number of tokens each step, geometric multiplies by the same.
    """

    start: int
    end: int
    steps: int
    growth: str = "linear"

    def at(self, step: int) -> int:
        """Return the longest response of a step; the first one is 1."""
        share = min(1.0, (step - 1) / (self.steps - 1))
        if self.growth == "geometric":
            return round(self.start * (self.end / self.start) ** share)
        return round(self.start + (self.end - self.start) * share)


@dataclass(frozen=True)
class RunSection:
    """The run's directory, its seed and its name."""

    dir: str = key(
        MISSING, "Logs, checkpoints and the report; a run that is already there is resumed."
    )
    seed: int = key(0, "Order of the prompts, samples, the `random` selector.", NOT_NEGATIVE)
    name: str | None = key(None, "Title of the report; null: the directory's name.")


@dataclass(frozen=True)
class ParallelSection:
    """One model's layout; data parallelism is what remains of the ranks."""

    tp: int = key(1, "Tensor-parallel ranks.", COUNT)
    pp: int = key(1, "Pipeline-parallel stages.", COUNT)
    cp: int = key(
        1,
        "Context-parallel ranks, which share `train.micro_batch_tokens`: a sequence that does not "
        "fit the part of one of them is cut into 2·`cp` chunks, two for each. Without "
        "TransformerEngine the student's core attention is then always computed again in the "
        "backward pass.",
        COUNT,
    )
    sequence: bool = key(
        False,
        "Sequence parallelism over the tensor-parallel group. Without it, experts get each token "
        "`tp` times.",
    )
    ep: int = key(1, "Expert-parallel ranks, among the data-parallel ones.", COUNT)

    @property
    def sizes(self) -> str:
        """Write out what divides the ranks."""
        context = f"cp {self.cp} × " if self.cp > 1 else ""
        return f"tp {self.tp} × {context}pp {self.pp}"


@dataclass(frozen=True)
class MoeSection:
    """The routers of a student that is a mixture of experts."""

    router: Literal["train", "frozen"] = key("train", "`train`, or `frozen`: they do not learn.")
    aux_loss: float = key(
        0.0,
        "Weight of the auxiliary loss that balances the experts' load (Switch Transformers', by "
        "micro-batch); 0: off.",
        NOT_NEGATIVE,
    )


@dataclass(frozen=True)
class StudentSection:
    """The model that learns."""

    path: str = key(
        MISSING, "Hugging Face checkpoint directory, or `OWNER/NAME[@REVISION]` on the hub."
    )
    parallel: ParallelSection = field(default_factory=ParallelSection)
    moe: MoeSection = field(default_factory=MoeSection)


@dataclass(frozen=True)
class ServersSection:
    """SGLang servers of one model: the run's own, or some that are there already."""

    urls: tuple[str, ...] = key(
        (), "Servers that are there, `http://HOST:PORT` each; none: the run starts its own."
    )
    replicas: int = key(1, "How many servers the run starts.", COUNT)
    tp: int = key(1, "Tensor parallelism of each of them.", COUNT)
    gpus: tuple[int, ...] | None = key(
        None,
        "Devices of the run's own servers, `replicas` × `tp` of them, dealt out in this order; "
        "null: every server sees every device of the machine.",
    )
    host: str = key("127.0.0.1", "The address that the run's own servers listen on.")
    api_key_env: str | None = key(
        None, "The environment variable that holds the key of every request."
    )
    concurrency: int = key(64, "Requests at a time, per server.", COUNT)
    timeout_s: float = key(
        600.0,
        "Seconds that one request may take; it is then sent again. Less than "
        "`watchdog.stall_timeout_s`.",
        POSITIVE,
    )
    max_retries: int = key(
        3,
        "A request that fails is sent again so many times, to whichever server; then the step "
        "fails.",
        NOT_NEGATIVE,
    )
    start_timeout_s: float = key(
        900.0, "Seconds until the servers listen, whoever started them.", POSITIVE
    )
    context_length: int | None = key(
        None, "Longest sequence of a server; null: prompt and response of this run.", COUNT
    )
    max_running_requests: int | None = key(
        None, "Requests that a server runs at a time; null: SGLang chooses.", COUNT
    )
    max_total_tokens: int | None = key(
        None, "Tokens of the KV cache; null: what `mem_fraction` leaves.", COUNT
    )
    mem_fraction: float | None = key(
        None,
        "Share of the device's memory for weights and KV cache; null: SGLang chooses. Servers on "
        "devices of ranks get so much of all memory, whatever is free (null: .85), as a number of "
        "tokens; elsewhere it is of what is free at their start.",
        INSIDE,
    )
    args: tuple[str, ...] = key((), "Further arguments of `sglang.launch_server`.")


@dataclass(frozen=True)
class TeacherSection:
    """The model that is distilled."""

    path: str = key(
        MISSING, "Hugging Face checkpoint directory, or `OWNER/NAME[@REVISION]` on the hub."
    )
    source: Literal["path", "student", "student_ema"] = key(
        "path",
        "Where the teacher's weights come from. `path`: the checkpoint of that key. `student`: the "
        "student's own before the first step, frozen. `student_ema`: a moving average of the "
        "student's over its updates. With the last two, `path` is `student.path` and left out.",
    )
    ema: float = key(
        0.99,
        "With `source: student_ema`, what stays of the average at each update; 0: the teacher is "
        "the student.",
        DECAY,
    )
    engine: Literal["megatron", "sglang"] = key(
        "megatron", "`megatron`: on the training ranks. `sglang`: on servers."
    )
    servers: ServersSection = field(default_factory=ServersSection)
    form: Literal["hidden_states", "topk"] = key(
        "hidden_states",
        "What the servers report for a row. `hidden_states`: its hidden state; scores and loss are "
        "exact, and the head is read from `path`. `topk`: log-probabilities of the `topk` "
        "likeliest tokens; scores and loss are bounds, and `path` needs no weights.",
    )
    topk: int = key(64, "How many tokens a row reports with `form: topk`.", COUNT)
    prompt: Literal["own", "student"] = key(
        "own", "Whose chat template and tokenizer render what the teacher reads before a response."
    )
    template_kwargs: dict[str, Any] | None = key(
        None, "Variables of the teacher's chat template; null: as in `data.template_kwargs`."
    )
    system: str | None = key(
        None, "System message that the teacher reads instead of the student's; null: the same."
    )
    context_column: str | None = key(
        None,
        "Column of `data.prompts` with text that only the teacher reads: a worked solution, a "
        "hint, a document. Dots reach into nested columns. A row whose value is null or blank has "
        "none, and the teacher reads of it what the student does.",
    )
    context_template: str = key(
        "{{ prompt }}\n\n{{ context }}",
        "What the last message of a prompt with a context says to the teacher: Jinja, with "
        "`prompt` (what it says to the student) and `context`.",
    )
    context_overflow: Literal["drop", "cut"] = key(
        "drop",
        "What becomes of a prompt that its context makes too long: it is dropped, or the context "
        "loses its end.",
    )
    max_prompt_tokens: int | None = key(
        None,
        "Prompts that are longer for the teacher are dropped; null: as `data.max_prompt_tokens`.",
        COUNT,
    )
    parallel: ParallelSection = field(default_factory=ParallelSection)
    offload: bool = key(
        False,
        "Keep the weights in pinned host memory between uses. They come back while rollout servers "
        "generate (`rollout.stream`), or when the responses are there.",
    )


@dataclass(frozen=True)
class DataSection:
    """The prompts that are trained on."""

    prompts: Any = key(
        MISSING,
        "A .jsonl, .json (lines or an array; both also .gz) or .parquet file; a directory that "
        "`Dataset.save_to_disk` wrote; `hf://datasets/OWNER/NAME[@REVISION][/FILE or SPLIT]`; or a "
        "list. The files of a list are read as one, or each has its share of the prompts that are "
        "drawn: `[{path: a.jsonl, weight: 3}, {path: b.parquet, weight: 1}]`.",
    )
    prompt_column: str = key(
        "prompt",
        "Text or a list of messages. Dots reach into nested columns. GSM8K: `question`; "
        "DAPO-Math-17k: `prompt`.",
    )
    answer_column: str = key(
        "answer", "GSM8K: `answer`; DAPO-Math-17k: `reward_model.ground_truth`."
    )
    response_column: str | None = key(
        None,
        "Column of `prompts` with a reference response for each prompt, which `rollout.mix` and "
        "`rollout.warmup_steps` train on: text, or messages whose last one is the assistant's. It "
        "may be `prompt_column` itself, whose prompts then lose that message.",
    )
    excluded_column: str | None = key(
        None,
        "Column of `prompts` with the characters of the reference response that are read and not "
        "trained on, tool output say: `[[start, end], …]`, or null.",
    )
    template: Literal["auto", "chat", "plain"] = key(
        "auto",
        "`chat` applies the tokenizer's chat template, `plain` joins the messages; `auto` is chat "
        "where the tokenizer has a template.",
    )
    template_kwargs: dict[str, Any] | None = key(
        None,
        "Variables of the chat template, such as `{enable_thinking: false}`. One that writes the "
        "date has to be given it: `{date_string: 26 Jul 2024}`.",
    )
    system: str | None = key(None, "System message, for prompts that have none of their own.")
    max_prompt_tokens: int = key(
        1024, "Prompts that are longer for either model are dropped.", COUNT
    )
    teacher_column: str | None = key(
        None,
        "Column with the name of the teacher, of those in `teachers`, that each prompt is for. "
        "Where it is null or blank, and without a column, that is the `teacher` of the file: "
        "`prompts: [{path: a.jsonl, weight: 1, teacher: math}, …]`.",
    )
    shuffle: bool = key(True, "Shuffle the prompts, in each epoch anew.")
    limit: int | None = key(
        None, "Use the first prompts only; of each of the files that have weights.", COUNT
    )
    deduplicate: bool = key(
        True,
        "Leave out rows of `prompts` whose prompt and answer, and reference response if there is "
        "one, are those of a row before; the log has their number. Held-out prompts are all asked.",
    )
    cache_dir: str | None = key(
        None,
        "Where tokenised prompts are kept, to be read by the next start; null: "
        "`$XDG_CACHE_HOME/megatron-taopd/prompts`, `~/.cache` without that variable.",
    )


@dataclass(frozen=True)
class SyncSection:
    """How the student's weights reach the rollout servers."""

    transport: Literal["distributed", "tensor", "disk"] = key(
        "distributed",
        "`distributed`: broadcast in a process group with the servers (NCCL, gloo on the CPU). "
        "`tensor`: in the request, as handles to shared device memory where both are on one "
        "machine. `disk`: a checkpoint in `dir` that the servers read.",
    )
    bucket_mib: int = key(512, "MiB of weights that are on their way at a time.", COUNT)
    dir: str | None = key(None, "With `disk`, a directory that both sides see; null: in `run.dir`.")
    release_memory: bool = key(
        False, "Colocated servers give their device memory back while the student trains."
    )
    cache: Literal["recompute", "keep"] = key(
        "recompute",
        "What becomes of the KV cache of responses that an update interrupts: computed anew with "
        "the new weights, or kept as the old ones have made it, which saves that prefill.",
    )
    max_gap: float = key(
        0.3,
        "Mean |Δ log p| of engine and trainer on a few tokens after a sync, above which the run "
        "stops.",
        POSITIVE,
    )


@dataclass(frozen=True)
class RolloutSection:
    """The student's own responses."""

    engine: Literal["local", "sglang"] = key(
        "local", "`local`: transformers in the training ranks. `sglang`: on servers."
    )
    servers: ServersSection = field(default_factory=ServersSection)
    sync: SyncSection = field(default_factory=SyncSection)
    gap_warning: float = key(
        0.05, "Mean |Δ log p| of engine and trainer above which a step warns.", POSITIVE
    )
    prompts: int = key(64, "Prompts per step.", COUNT)
    samples: int = key(1, "Responses per prompt.", COUNT)
    max_new_tokens: int = key(64, "Longest response, its stop token included.", COUNT)
    horizon: Any = key(
        "none",
        "Beyond the paper: training responses end after so many tokens; `auto`: where more tokens "
        "no longer pay, at least `horizon_floor`; `{start: 32, end: 512, steps: 100}`: after "
        "`start` in the first step, `end` from step `steps` on, and between them a number that "
        "grows linearly, or with `growth: geometric` by the same factor each step. Evaluations "
        "generate in full.",
        kind="text, integer or mapping",
    )
    horizon_floor: int = key(32, "With `auto`, the shortest horizon.", COUNT)
    horizon_prompt_weight: float = key(
        0.5, "With `auto`, the cost of a prompt token; that of a response token is 1.", NOT_NEGATIVE
    )
    temperature: float = key(1.0, "Sampling temperature.", POSITIVE)
    top_p: float = key(1.0, "Sample from the smallest set with this mass; 1: all.", SHARE)
    top_k: int = key(0, "Sample from so many likeliest tokens; 0: all.", NOT_NEGATIVE)
    stop_token_ids: tuple[int, ...] = key(
        (), "Ids that end a response, in addition to the model's own end-of-sequence ids."
    )
    batch_size: int = key(64, "Sequences at a time on a rank of the local engine.", COUNT)
    ahead: int = key(
        0,
        "Steps that rollouts run ahead of training: 0 (on policy), or how many further batches are "
        "generated while one trains. Weights are updated between the tokens of a response.",
        NOT_NEGATIVE,
    )
    partial: bool = key(
        False,
        "A step takes the first `prompts` × `samples` of the responses under way that finish, and "
        "the others go on with the weights of the next steps; `ahead` + 1 times as many are under "
        "way. Needs `ahead` of 1 or more.",
    )
    max_staleness: int = key(
        4,
        "With `partial`, how many steps after the one that began it a response is waited for; more "
        "than `ahead`.",
        COUNT,
    )
    stream: bool = key(
        True, "The teacher reads responses as they finish; false: when all have finished."
    )
    mix: dict[str, float] | None = key(
        None,
        "`{dataset: 0.2}`: this share of the sequences are reference responses of the data "
        "(`data.response_column`) instead of the student's own; exact over the steps.",
    )
    warmup_steps: int = key(
        0, "The first steps train on reference responses only; nothing is generated.", NOT_NEGATIVE
    )
    speculative: dict[str, Any] | None = key(
        None,
        "Speculative decoding by the run's own servers on CUDA, with SGLang's options: "
        "`{algorithm: NGRAM, num_draft_tokens: 8}`, or `EAGLE`, `EAGLE3`, `STANDALONE` with a "
        "`draft_model_path`; see docs/sglang.md.",
    )


@dataclass(frozen=True)
class SelectionSection:
    """The response rows that the loss falls on."""

    selector: Selector = key("teachability", "One of the names in `megatron_taopd.SELECTORS`.")
    ratio: float = key(0.10, "ρ, the share of the response rows that is trained on.", SHARE)
    k: int = key(16, "Top-K of both models, for D and C.", COUNT)
    scope: Literal["batch", "teacher"] = key(
        "batch",
        "Of what the budget is a share, and over what scores are normalised: the rows of the whole "
        "batch, or of `teachers`, those of each.",
    )
    concentrate: float = key(
        0.0,
        "Beyond the paper: at least this share of the response tokens is left out of training. The "
        "same number of rows is kept, from the prefixes of the responses that hold most of their "
        "priority.",
        DECAY,
    )


@dataclass(frozen=True)
class LossSection:
    """The loss of the kept rows."""

    kind: Loss = key(
        "reverse_kl", "`reverse_kl`, `forward_kl`, `jsd`, `skewed_reverse_kl` or `sampled_token`."
    )
    beta: float = key(0.5, "jsd: the teacher's share in the mixture.", INSIDE)
    alpha: float = key(0.1, "skewed_reverse_kl: the student's share in the mixture.", INSIDE)
    weights: Literal["none", "discrepancy"] = key(
        "none",
        "Beyond the paper: what each kept row counts in the mean. `discrepancy`: 1 + `gamma` at "
        "the start of a response, falling to 1 with the accumulated |log p_T − log p_S| of its "
        "tokens.",
    )
    max_ratio: float | None = key(
        None,
        "sampled_token: importance ratios (p of the student now ÷ p when the token was drawn) "
        "count as at most this; null: as they are.",
        POSITIVE,
    )
    gamma: float = key(
        0.5, "With `weights: discrepancy`, how much more a response's first token counts.", POSITIVE
    )


@dataclass(frozen=True)
class ProfileSection:
    """Steps that run under a profiler, and are slower for it; see docs/launch.md."""

    steps: tuple[int, ...] = key((), "Steps that are profiled, counted from 1; none: off.")
    kind: Literal["torch", "nsys", "memory"] = key(
        "torch",
        "`torch`: a trace in `run.dir/profile/`. `nsys`: a range for Nsight Systems. `memory`: a "
        "snapshot of the device's allocator in `run.dir/profile/`. The last two need CUDA.",
    )
    ranks: tuple[int, ...] = key((0,), "Ranks that are profiled.")


@dataclass(frozen=True)
class TrainSection:
    """The length of the training, its pieces and its precision."""

    steps: int = key(100, "Rollout batches.", COUNT)
    micro_batch_tokens: int = key(
        4096, "The most tokens that a rank, or a group of `cp` ranks, runs at a time.", COUNT
    )
    mini_batches: int = key(1, "Optimizer steps per rollout batch.", COUNT)
    schedule: Literal["two_pass", "replay"] = key(
        "two_pass",
        "`two_pass`: the student runs forward over everything for the scores, then forward and "
        "backward over the cut sequences. `replay`: the layers' outputs of the first pass are "
        "kept, and the second runs each layer in the backward pass only (`pp` 1, one mini-batch).",
    )
    replay_memory_mib: int = key(
        8192,
        "MiB for the outputs that `replay` keeps, per rank; a step that needs more is done in two "
        "passes.",
        COUNT,
    )
    precision: Literal["fp32", "bf16"] = key(
        "fp32", "Of weights and activations; bf16 has fp32 master weights and gradients."
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none", "Activations that are computed again in the backward pass."
    )
    head_memory_mib: int = key(
        1024, "MiB for the logits of both models that exist at a time, per rank.", COUNT
    )
    profile: ProfileSection = field(default_factory=ProfileSection)


@dataclass(frozen=True)
class OptimizerSection:
    """Adam with decoupled weight decay."""

    lr: float = key(1e-6, "Learning rate after the warm-up.", POSITIVE)
    min_lr: float | None = key(
        None, "Where cosine or linear decay ends; null with constant.", NOT_NEGATIVE
    )
    decay: Literal["constant", "cosine", "linear"] = key(
        "constant", "The learning rate after the warm-up."
    )
    warmup_steps: int = key(10, "Optimizer steps of linear warm-up from 0.", NOT_NEGATIVE)
    weight_decay: float = key(0.1, "Decoupled weight decay.", NOT_NEGATIVE)
    beta1: float = key(0.9, "Decay of the first moment.", DECAY)
    beta2: float = key(0.98, "Decay of the second moment.", DECAY)
    eps: float = key(1e-8, "Added to the root of the second moment.", POSITIVE)
    clip: float = key(1.0, "Global gradient norm; 0: off.", NOT_NEGATIVE)


@dataclass(frozen=True)
class CheckpointSection:
    """What a run saves, and how much of it stays."""

    every: int = key(50, "Steps between checkpoints; 0: at the end only.", NOT_NEGATIVE)
    keep_last: int = key(3, "How many of the newest checkpoints are kept.", COUNT)
    keep_best: bool = key(
        True,
        "The checkpoint with the best held-out accuracy is kept, too; a step that beats all before "
        "it is saved.",
    )
    asynchronous: bool = key(
        True, "The next steps run while a checkpoint is written, from a copy in host memory."
    )
    trust: bool = key(
        False,
        "Also resume from a checkpoint that has no checksums, or holds more than tensors and plain "
        "values. It may come from a stranger, and loading it may run code.",
    )
    export_hf: bool = key(True, "Write the final student as a Hugging Face directory.")


@dataclass(frozen=True)
class EvalSection:
    """Accuracy on held-out prompts, during the run."""

    every: int = key(20, "Steps between evaluations; 0: at start and end only.", NOT_NEGATIVE)
    prompts: Any = key(
        None,
        "As `data.prompts`, with its columns and template, and without weights; null: no "
        "evaluation.",
    )
    max_new_tokens: int | None = key(None, "Longest response; null: as in `rollout`.", COUNT)
    limit: int | None = key(None, "Use the first prompts only.", COUNT)
    samples: int = key(1, "Responses per prompt.", COUNT)
    temperature: float = key(
        0.0, "0: greedy; otherwise with `top_p` and `top_k` of `rollout`.", NOT_NEGATIVE
    )
    pass_at: tuple[int, ...] = key((), "The k of pass@k.")
    grader: Literal["auto", "exact", "math"] = key(
        "auto",
        "`exact`: the stated answer is the reference, spelling aside. `math`: or equal to it as "
        "mathematics (Math-Verify). `auto`: math where that is installed.",
    )
    at_start: bool = key(True, "Evaluate before the first step.")


@dataclass(frozen=True)
class GuardSection:
    """Steps that are skipped, because their numbers mean nothing."""

    max_skipped: int = key(3, "Skipped steps in a row, after which the run ends.", COUNT)
    loss_spike: float = key(
        10.0,
        "An update is skipped if its loss is more than so many times the median of the last 32; 0: "
        "none is. Not for `sampled_token`, whose loss is no distance.",
        Bounds(above=1, or_zero=True),
    )
    teacher_every: int = key(
        50, "Steps between checks of the teacher's weights; 0: at checkpoints only.", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class WatchdogSection:
    """The time after which ranks that die or hang end the job."""

    heartbeat_timeout_s: float = key(
        60.0,
        "Seconds without a heartbeat of a rank; 0: no watchdog.",
        Bounds(at_least=1, or_zero=True),
    )
    stall_timeout_s: float = key(
        900.0,
        "Seconds in which no rank makes progress; 0: as long as the backend waits.",
        NOT_NEGATIVE,
    )


@dataclass(frozen=True)
class LogSection:
    """The places where the numbers go in addition to metrics.jsonl and the report."""

    tensorboard: bool = key(True, "Write TensorBoard events.")
    wandb_project: str | None = key(None, "A Weights & Biases project; null: off.")
    prometheus_port: int | None = key(
        None,
        "The newest numbers at `http://HOST:PORT/metrics`; null: off.",
        PORT,
    )
    prometheus_host: str = key("127.0.0.1", "The address that rank 0 listens on.")
    peak_tflops: float | None = key(
        None,
        "What one GPU can do at most in `train.precision`, in 10^12 operations a second, dense: "
        "100 % of `perf/mfu`. null: by the device's name; on the CPU, and on a device that is not "
        "known, there is no `perf/mfu`.",
        POSITIVE,
    )
    samples: int = key(
        4,
        "Responses of a step, and answers of an evaluation, that the report shows with their "
        "tokens; of the first and the newest, in `samples.json`. 0: none, and no D–C plane.",
        Bounds(at_least=0, at_most=16),
    )


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on, with absolute paths."""

    run: RunSection = field(default_factory=RunSection)
    student: StudentSection = field(default_factory=StudentSection)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    teachers: dict[str, TeacherSection] | None = key(
        None,
        "Several teachers by name, `{math: {path: …}, code: {path: …}}`: each is a section like "
        "`teacher`, which has no `path` then, and whose keys count for all that do not give them. "
        "See docs/teachers.md.",
    )
    data: DataSection = field(default_factory=DataSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    selection: SelectionSection = field(default_factory=SelectionSection)
    loss: LossSection = field(default_factory=LossSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    guard: GuardSection = field(default_factory=GuardSection)
    watchdog: WatchdogSection = field(default_factory=WatchdogSection)
    log: LogSection = field(default_factory=LogSection)

    @property
    def each_teacher(self) -> dict[str, TeacherSection]:
        """Return the section of every teacher by its key: `teacher`, or `teachers.NAME` each."""
        named = self.teachers or {}
        return {f"teachers.{name}": named[name] for name in named} or {"teacher": self.teacher}

    def with_teachers(self, sections: Mapping[str, TeacherSection]) -> Config:
        """Return a configuration with other sections of its teachers, by key."""
        if not self.teachers:
            return replace(self, teacher=sections["teacher"])
        return replace(self, teachers={teacher_name(key): each for key, each in sections.items()})

    @property
    def models(self) -> dict[str, StudentSection | TeacherSection]:
        """Return the section of every model by its key."""
        return {"student": self.student, **self.each_teacher}

    @property
    def served(self) -> dict[str, RolloutSection | TeacherSection]:
        """Return the section of everything that SGLang servers do, by its key."""
        sections: dict[str, RolloutSection | TeacherSection] = {"rollout": self.rollout}
        sections |= self.each_teacher
        return {key: section for key, section in sections.items() if section.engine == "sglang"}

    def prompt_limit(self, model: str) -> tuple[str, int]:
        """Return the key that bounds what a model reads before a response, and its tokens.

        Args:
            model: a key of `models`.
        """
        own = getattr(self.models[model], "max_prompt_tokens", None)
        if own is not None:
            return f"{model}.max_prompt_tokens", own
        return "data.max_prompt_tokens", self.data.max_prompt_tokens

    @property
    def teacher_prompt_tokens(self) -> int:
        """Return the longest prompt that a teacher reads, its context included."""
        return max(self.prompt_limit(key)[1] for key in self.each_teacher)


def teacher_name(key: str) -> str:
    """Return the name of a teacher by the key of its section (`Config.each_teacher`)."""
    return key.rpartition(".")[2]


types_of = functools.cache(get_type_hints)  # evaluating annotations takes a millisecond a section


def leaf_keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """List every key that has a value: its dotted name, its section's class and its name there."""
    for name, hint in types_of(kind).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from leaf_keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind, name


def check_bounds(config: Config) -> None:
    """Raise ValueError for the first number outside of its key's bounds: key, value, bounds."""
    keys = [*leaf_keys()]
    if config.teachers:
        keys += [
            each for key in config.each_teacher for each in leaf_keys(TeacherSection, f"{key}.")
        ]
    for dotted, kind, name in keys:
        bounds = kind.__dataclass_fields__[name].metadata["bounds"]  # type: ignore[attr-defined]
        value: Any = config
        for part in dotted.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        if bounds is not None and value is not None and not bounds.hold(value):
            raise ValueError(f"{dotted}: {value}; it has to be {bounds}")
