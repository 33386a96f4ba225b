"""Variables of NCCL that all processes of a group need alike, or it fails or hangs.

Ranks of a run have groups among each other, and the first one has some with the workers of SGLang's
servers (`rollout.sync.transport: distributed`). SGLang sets two of the variables to 0 where they
are not set, NCCL itself does not.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

DEFAULTS = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
ALIKE = (
    *DEFAULTS,
    *("NCCL_MNNVL_ENABLE", "NCCL_COLLNET_ENABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NET"),
    *("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"),
    *("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_BUFFSIZE"),
)
UNSET = "unset"


def set_defaults(environment: MutableMapping[str, str]) -> None:
    """Set what SGLang sets, where it is not set; before a process makes its first group."""
    for name, value in DEFAULTS.items():
        environment.setdefault(name, value)


def values(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables ALIKE as a process with this environment will have them."""
    return {name: environment.get(name, DEFAULTS.get(name, UNSET)) for name in ALIKE}


def of_server(environment: Mapping[str, str], options: Mapping[str, object]) -> dict[str, str]:
    """Return the variables ALIKE in an SGLang server's workers; its options win over variables.

    Args:
        environment: that it was started with.
        options: its arguments by name, as /server_info has them.
    """
    found = values(environment)
    if options.get("enable_symm_mem"):
        found["NCCL_CUMEM_ENABLE"] = "1"
    if options.get("enable_symm_mem") or options.get("enable_nccl_nvls"):
        found["NCCL_NVLS_ENABLE"] = "1"
    return found
