"""Megatron TA-OPD: on-policy distillation on the tokens that the student can learn from."""

from __future__ import annotations

import importlib
import sys

from megatron_taopd.launch import ENDED_AT_ONCE, MISTAKE
from megatron_taopd.parallel.imports import long_imports

COMMANDS = {
    "train": ("megatron_taopd.train", "run a training: CONFIG.yaml section.key=value …"),
    "launch": (
        "megatron_taopd.launch",
        "start a run's ranks: [torchrun's options] CONFIG.yaml section.key=value …",
    ),
    "doctor": ("megatron_taopd.cli.doctor", "examine a run before it starts"),
    "plan": ("megatron_taopd.cli.plan", "memory and time of a run on GPUs that need not be there"),
    "serve": ("megatron_taopd.cli.serve", "this machine's SGLang servers, for a run on others"),
    "convert": ("megatron_taopd.cli.convert", "checkpoints between Hugging Face and Megatron"),
    "verify": (
        "megatron_taopd.cli.verify",
        "two checkpoints, tensor by tensor and by logits",
    ),
    "evaluate": ("megatron_taopd.cli.evaluate", "the paper's six benchmarks, by EvalScope"),
    "diagnose": ("megatron_taopd.cli.diagnose", "which token positions a student learns from"),
    "compare": ("megatron_taopd.cli.compare", "runs, selectors, students and teachers"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names, and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return choose("taopd", __doc__ or "", COMMANDS, arguments)
    except KeyboardInterrupt:  # also while a command is imported
        return ENDED_AT_ONCE


def choose(
    program: str, about: str, commands: dict[str, tuple[str, str]], arguments: list[str]
) -> int:
    """Import the module of one command alone, since torch takes seconds, and call its `main`.

    Args:
        program: as a person has called it.
        about: says above the list of commands what they are for.
        commands: name → (module, what it does).
        arguments: the command's name and its own arguments.
    """
    name, *rest = arguments or [""]
    if name in commands:
        with long_imports():
            module = importlib.import_module(commands[name][0])
        return module.main(rest)
    if name in ("-h", "--help", ""):
        print(f"{about.strip()}\n\nusage: {program} COMMAND …\n")
        for command, (_, does) in commands.items():
            print(f"  {command:11}{does}")
        print(f"\n`{program} COMMAND --help` has the options of one.")
        return 0 if name else MISTAKE
    known = ", ".join(commands)
    print(f"error: {program}: no command {name!r}; there are {known}", file=sys.stderr)
    return MISTAKE
