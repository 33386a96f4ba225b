"""What devices and links can do, and what share of it a step is taken to attain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_taopd.monitoring.throughput import device_peak


@dataclass(frozen=True)
class Cluster:
    """One kind of GPU node. Vendors' figures first; the rest are assumptions, meant to be changed.

    Rates are decimal (10^9 bytes/s, 10^12 operations/s), memory is GiB.
    """

    name: str = MISSING
    memory_gib: float = MISSING  # of a GPU, as CUDA reports it
    bf16_tflops: float = MISSING  # dense
    fp32_tflops: float = MISSING
    hbm_gb_s: float = MISSING
    nvlink_gb_s: float = MISSING  # per GPU, both directions together
    network_gb_s: float = MISSING  # per GPU, each direction
    pcie_gb_s: float = 25.0  # per GPU, each direction: the teacher's offloaded weights
    storage_gb_s: float = 2.0  # of the file system, all ranks together

    # CUDA context, NCCL buffers of some twenty groups, cuBLAS workspaces, fragmentation.
    reserve_gib: float = 5.0
    trunk_fraction: float = 0.35  # of the peak, in the layers' matrix products and attention
    head_fraction: float = 0.35  # in scores and losses over the vocabulary
    hbm_fraction: float = 0.6  # of the bandwidth, in decoding and in the optimizer
    link_fraction: float = 0.6  # of NVLink and the network, in large collectives
    # Eager transformers launches its kernels one by one: a decoding step takes at least this long
    # per layer. SGLang replays graphs.
    local_layer_us: float = 600.0


def _known(name: str, memory_gib: float, *rates: float) -> Cluster:
    """Describe a device whose peaks the log of a run knows, too."""
    peaks = (device_peak(name, precision) for precision in ("bf16", "fp32"))
    return Cluster(name, memory_gib, *peaks, *rates)


CLUSTERS = {
    "h800": _known("H800 80 GB", 79.0, 3350.0, 400.0, 50.0),
    "h100": _known("H100 80 GB", 79.0, 3350.0, 900.0, 50.0),
    "h200": _known("H200 141 GB", 139.0, 4800.0, 900.0, 50.0),
    "a100": _known("A100 80 GB", 79.0, 2039.0, 600.0, 25.0),
}


def load_cluster(name: str) -> Cluster:
    """Return a built-in cluster, or read one from a YAML file with the fields of `Cluster`.

    Raises:
        ValueError: no such cluster or file; an unknown, missing or impossible field.
    """
    if name.lower() in CLUSTERS:
        return CLUSTERS[name.lower()]
    if not Path(name).is_file():
        raise ValueError(f"--cluster: {name}: give {', '.join(CLUSTERS)} or a YAML file")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Cluster), OmegaConf.load(name))
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except (YAMLError, ValueError) as error:
        raise ValueError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    for field, value in vars(cluster).items():
        if field == "name":
            continue
        if value <= 0 and field != "reserve_gib":
            raise ValueError(f"{name}: {field}: {value}; it has to be more than 0")
        if field.endswith("_fraction") and value > 1:
            raise ValueError(f"{name}: {field}: {value}; it has to be at most 1")
    return cluster
