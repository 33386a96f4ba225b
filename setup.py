"""The package, what it needs, and the command that it installs."""

from setuptools import find_packages, setup

# The first three depend on each other's internals. constraints.txt has the exact versions of
# everything of one tried set-up, on the CPU, and requirements/cuda.txt those that go with CUDA.
# tests/versions.sh tries every megatron-core that is allowed; from 0.17 on it needs Python 3.12.
REQUIRED = [
    "torch==2.13.0",
    "megatron-core>=0.16.1,<0.20",
    "transformers==5.12.1",  # the one that SGLang 0.5.20 pins
    "safetensors>=0.5",
    "omegaconf>=2.4",
    "numpy>=1.26",
    "pyarrow>=15",
    "pyyaml>=6",
    "rich>=13",
    "tensorboard>=2.16",
    "einops>=0.7",  # megatron-core needs these two and does not say so
    "psutil>=5.9",
    "httpx>=0.27",
    "msgspec>=0.19",
    "jinja2>=3.1",  # both reports; torch brings it, too
]
EXTRAS = {
    "sglang": ["sglang==0.5.20"],  # with CUDA; without: requirements/sglang-cpu.txt
    "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],  # megatron-core's own bounds
    # In an environment of its own, as it cannot stand next to SGLang: docs/evaluation.md
    "eval": ["evalscope>=1.14", "langdetect"],
    "math": ["math-verify[antlr4_13_2]>=0.9"],  # eval.grader: math
    "plots": ["matplotlib>=3.9"],  # taopd compare runs, taopd diagnose analyze
    "wandb": ["wandb>=0.19"],
    "prometheus": ["prometheus-client>=0.20"],
    "smollm2": ["gguf>=0.17", "accelerate>=1"],  # tools/prepare_smollm2.py
    "docs": ["mkdocs-material>=9.7"],
    # Rivals in benchmarks/vocab_parallel. With constraints.txt, so that torch stays what it is.
    "bench": ["trl==1.16.0", "liger-kernel==0.8.5"],
    # Triton comes with torch for CUDA; on a machine without one its kernels are tested interpreted.
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3",
        "hypothesis>=6",
        "math-verify[antlr4_13_2]>=0.9",
        "matplotlib>=3.9",
        "playwright>=1.45",  # drives an installed Chromium in tests of pages
        "prometheus-client>=0.20",
        "mypy>=1.18",
        "ruff>=0.9",
        "triton>=3.4; platform_system == 'Linux'",
    ],
}

setup(
    name="megatron-taopd",
    version="0.1.0",
    description="Token-teachability-aware on-policy distillation on Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_taopd", "megatron_taopd.*"]),
    package_data={
        "megatron_taopd": ["py.typed"],
        "megatron_taopd.serving": ["cpu_stubs/*.py"],
        "megatron_taopd.monitoring": ["templates/*"],
        "megatron_taopd.diagnostics": ["templates/*"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["taopd = megatron_taopd.cli:main"]},
)
