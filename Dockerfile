# The image of a GPU node: Debian's packages and what `make setup` makes. torch's wheels bring CUDA 12.8 with kernels for the
# V100; the host brings the driver and NVIDIA's container toolkit.
#   docker build -t rsa-fast .
#   docker run --rm --gpus all --ipc host -v /data:/data:ro -v /runs:/runs rsa-fast train --gpus 8 ...
FROM python:3.11.7-slim-bookworm

# Debian keeps one version of a package, so that a pinned one could not be installed after its next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libopencv-dev libturbojpeg0-dev make pkg-config \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 rsa \
    && install -d -o rsa /opt/rsa-fast

USER 1000
WORKDIR /opt/rsa-fast
COPY --chown=1000 . .
# Where FFCV does not build, setup goes on without it: an image does not.
RUN --mount=type=cache,target=/home/rsa/.cache/pip,uid=1000 make setup && .venv/bin/python -c "import ffcv"

ENV PATH=/opt/rsa-fast/.venv/bin:$PATH
ENTRYPOINT ["rsa-fast"]
CMD ["doctor"]
