# The OpenAI-compatible server of guided decoding on CPUs: the environment of `make vllm` and the command of `make serve`.
#   docker build -t genarm-serve .
#   docker run --network host -v "$PWD/models:/app/models:ro" -v "$PWD/params.yaml:/app/params.yaml:ro" genarm-serve --port 8000
FROM python:3.11-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home server
WORKDIR /app
# torch first and alone, then everything else by exact version, without resolving anything.
COPY requirements-vllm.lock ./
RUN pip install --no-cache-dir "$(grep '^torch==' requirements-vllm.lock)" \
 && pip install --no-cache-dir --no-deps --requirement requirements-vllm.lock
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
ENV HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
USER server
ENTRYPOINT ["python", "-m", "pipeline", "serve"]
