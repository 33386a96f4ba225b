"""The caches of servers that share devices with ranks: sized by the plan, not by who comes first.

SGLang's `--mem-fraction-static` is a share of what is free when the server starts, and its cache
takes what is left of that when its weights are there. On a device of a rank, which loads its models
meanwhile, both depend on the order. So such a server is told the number of tokens.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_taopd.config.schema import Config, ServersSection
from megatron_taopd.formats.hf import load_config
from megatron_taopd.formats.hf_map import FAMILIES
from megatron_taopd.monitoring.throughput import devices_of
from megatron_taopd.plan.setup import SGLANG_MEM_FRACTION
from megatron_taopd.plan.shapes import Architecture

# With a number of tokens, the share of what is free is a bound only; SGLang takes the smaller.
CEILING = 0.95


def sized(config: Config, local_ranks: int, device_bytes: int | None) -> Config:
    """Give the run's own servers on devices of ranks the tokens that the plan leaves them.

    Args:
        local_ranks: of the first node; they are on its first devices.
        device_bytes: of each of them, all memory; None on a CPU: nothing changes.

    Returns:
        The configuration with `max_total_tokens` of these servers. It stays as it is where that is
        given, and for a model that is of no family of `hf_map`, whose sizes are not known.

    Raises:
        ValueError: there is no room for a cache.
    """
    sizes = {}
    for name, section in config.served.items():
        servers: ServersSection = section.servers
        if device_bytes is None or servers.urls:
            continue
        if servers.max_total_tokens is not None or min(devices_of(servers)) >= local_ranks:
            continue
        model = config.models["student" if name == "rollout" else name]
        if name == "rollout" and "draft_model_path" in (config.rollout.speculative or {}):
            raise ValueError(
                "rollout.servers.max_total_tokens: null with rollout.speculative.draft_model_path "
                "on devices of ranks: the memory of the draft model is not known; give the tokens "
                "of the cache"
            )
        hf = load_config(model.path)
        if hf.model_type not in FAMILIES:
            continue
        tokens = cache_tokens(
            servers, Architecture.of(hf), 4 if config.train.precision == "fp32" else 2, device_bytes
        )
        if tokens < 1:
            raise ValueError(
                f"{name}.servers.mem_fraction: {servers.mem_fraction or SGLANG_MEM_FRACTION} of "
                f"{device_bytes / 2**30:.0f} GiB does not hold the weights; give more, or more tp"
            )
        servers = replace(servers, max_total_tokens=tokens, mem_fraction=CEILING)
        sizes[name] = replace(section, servers=servers)
    rollout = sizes.pop("rollout", config.rollout)
    return replace(config.with_teachers({**config.each_teacher, **sizes}), rollout=rollout)


def cache_tokens(
    servers: ServersSection, model: Architecture, itemsize: int, device_bytes: int
) -> int:
    """Return the tokens whose keys and values fit next to the weights into the servers' share.

    Args:
        itemsize: bytes of an element of weights and cache.
    """
    share = (servers.mem_fraction or SGLANG_MEM_FRACTION) * device_bytes
    weights = model.elements * itemsize / servers.tp
    groups = max(1, model.groups // servers.tp)
    token = 2 * model.layers * groups * model.head_dim * itemsize
    return int((share - weights) // token)
