# The command line and `segvit serve`. TORCH_INDEX: an index with torch for CPUs alone, or for another CUDA than its own.
#   docker build -t segvit . && docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs:/runs:ro" segvit serve /runs/NAME --host 0.0.0.0
FROM python:3.12-slim-bookworm AS build
ARG TORCH_INDEX=""
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/segvit
ENV PATH=/opt/segvit/bin:$PATH PIP_NO_CACHE_DIR=1
# Bounds stand in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install "torch>=2.11" torchvision ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    && pip install "setuptools>=77"
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY csrc csrc
COPY segvit_kernels segvit_kernels
COPY segvit segvit
# hadolint ignore=DL3013
RUN SEGVIT_KERNELS_NATIVE=1 pip install --no-build-isolation ".[train,serve,timm,hub,tiff]"

FROM python:3.12-slim-bookworm
RUN useradd --create-home --uid 1000 segvit
COPY --from=build /opt/segvit /opt/segvit
ENV PATH=/opt/segvit/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/segvit
EXPOSE 8000
ENTRYPOINT ["segvit"]
CMD ["--help"]
