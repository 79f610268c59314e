# The image of a GPU node. It contains Debian's packages and the environment of `make setup`. torch's wheels contain CUDA 12.8
# with kernels for the V100. The host provides the driver and NVIDIA's container toolkit.
#   docker build -t rsa-fast .
#   docker run --rm --gpus all --ipc host -v /data:/data:ro -v /runs:/runs rsa-fast train --gpus 8 ...
FROM python:3.11.7-slim-bookworm

# Debian has only one version of a package, so a pinned version could not be installed after the next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libopencv-dev libturbojpeg0-dev make pkg-config \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 rsa \
    && install -d -o rsa /opt/rsa-fast

USER 1000
WORKDIR /opt/rsa-fast
COPY --chown=1000 . .
# If FFCV does not build, the set-up continues without it. Building the image fails instead.
RUN --mount=type=cache,target=/home/rsa/.cache/pip,uid=1000 make setup && .venv/bin/python -c "import ffcv"

ENV PATH=/opt/rsa-fast/.venv/bin:$PATH
ENTRYPOINT ["rsa-fast"]
CMD ["doctor"]
