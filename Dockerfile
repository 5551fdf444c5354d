# Training, evaluation and serving in one image. From the project's root:
#   docker build --target cpu  -t soundwave:cpu  .    (--build-arg PIP_EXTRA_INDEX_URL=... : an index with torch's CPU build)
#   docker build --target cuda -t soundwave:cuda .
#   docker run --rm -p 127.0.0.1:8000:8000 -v /models:/models:ro soundwave:cpu python -m serving /models/sft --host 0.0.0.0
# Build with BuildKit: only the target's own stages are built.
ARG CPU_BASE=debian:bookworm-slim
# With CUDA's compiler, of the version that torch's wheels bring; flash-attn is built with it where it is asked for.
ARG CUDA_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${CPU_BASE} AS cpu-system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM ${CUDA_BASE} AS cuda-system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The project without its environment; copied into both.
FROM scratch AS project
WORKDIR /opt/soundwave
COPY . .

FROM cpu-system AS cpu
COPY --from=project /opt/soundwave /opt/soundwave
WORKDIR /opt/soundwave
ARG PIP_EXTRA_INDEX_URL
RUN python3 install/setup_env.py --venv /opt/venv --gpu no --extras av serve && rm -rf /root/.cache
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/soundwave HF_HUB_OFFLINE=1
USER 1000
EXPOSE 8000
CMD ["python", "-m", "serving", "--help"]

FROM cuda-system AS cuda
COPY --from=project /opt/soundwave /opt/soundwave
WORKDIR /opt/soundwave
RUN python3 install/setup_env.py --venv /opt/venv --gpu yes --extras av serve && rm -rf /root/.cache
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/soundwave HF_HUB_OFFLINE=1
USER 1000
EXPOSE 8000
CMD ["python", "-m", "serving", "--help"]
