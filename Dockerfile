# syntax=docker/dockerfile:1
# The package, SGLang and all that they need on Linux with CUDA 13.0: see docs/install.md.
#
#   docker build --tag taopd .                 # --build-arg TE=1 compiles TransformerEngine, too
#   docker run --rm --gpus all taopd taopd doctor …
ARG CUDA=13.0.1-cudnn-devel-ubuntu24.04

# ---------------------------------------------------------------- the environment, in /opt/venv
FROM nvidia/cuda:${CUDA} AS environment
ARG TE=0
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# The packages come first: a change of the code leaves this layer as it is.
COPY requirements/cuda.txt /tmp/cuda.txt
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip pip install --requirement /tmp/cuda.txt
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    if [ "$TE" = 1 ]; then \
        pip install --no-build-isolation --constraint /tmp/cuda.txt \
            'transformer-engine[core_cu13,pytorch]>=2.9,<2.12'; \
    fi
WORKDIR /src
COPY setup.py pyproject.toml ./
COPY megatron_taopd megatron_taopd
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# ---------------------------------------------------------------- what runs
# Again with the toolkit: SGLang compiles kernels when it starts.
FROM nvidia/cuda:${CUDA}
LABEL org.opencontainers.image.title="Megatron TA-OPD" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential gettext-base libibverbs1 libnuma1 librdmacm1 python3-dev rdma-core \
    && rm -rf /var/lib/apt/lists/* \
    # Ubuntu's image has user 1000 already.
    && userdel --remove ubuntu \
    && useradd --create-home --uid 1000 taopd \
    && install --directory --owner taopd --group taopd /models /data /runs
COPY --from=environment /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH MODELS=/models DATA=/data RUNS=/runs PYTHONUNBUFFERED=1
WORKDIR /opt/taopd
COPY LICENSE README.md ./
COPY examples examples
USER 1000:1000
CMD ["taopd", "--help"]
