"""The models of a configuration as directories, wherever they come from."""

from __future__ import annotations

from dataclasses import replace

from megatron_taopd.config.schema import Config
from megatron_taopd.formats.hub import model_directory


def with_model_directories(config: Config, weights: bool = True) -> Config:
    """Return a configuration whose models are directories, downloaded if need be.

    Args:
        weights: whether they are needed; False for what looks at a model's description alone.

    Raises:
        ValueError: see `model_directory`; the line begins with the key.
    """
    found = {}
    for name, section in config.models.items():
        try:
            found[name] = replace(section, path=model_directory(section.path, weights))
        except ValueError as error:
            raise ValueError(f"{name}.path: {error}") from None
    student = found.pop("student")
    return replace(config.with_teachers(found), student=student)
