# The server as an image, on the Python of the distribution that the base is: 3.12 on Ubuntu 24.04.
#
#   docker build -t lovasz-server .                                    for NVIDIA GPUs; runs on a CPU as well
#   docker build -t lovasz-server:cpu --build-arg BASE=ubuntu:24.04 \
#     --build-arg PIP_EXTRA_INDEX_URL=INDEX .                          for CPUs alone
#
# INDEX is the address of PyTorch's CPU wheels, as its installation page gives it: their version (2.13.0+cpu) counts as
# newer than the same without a suffix, so pip takes them. Without INDEX, the CPU image works too, but carries gigabytes
# of CUDA libraries that it never loads.

# CUDA as in constraints.txt (cuda-toolkit). PyTorch's wheels bring CUDA libraries of their own; the base adds what the
# NVIDIA container runtime wants to be told.
ARG BASE=nvidia/cuda:13.0.3-runtime-ubuntu24.04@sha256:76f46f3e649824ebd3685d3d86c42b0ea62af04f59242f419f56cd5804a72efb

# hadolint ignore=DL3006
FROM ${BASE} AS python
# The distribution's security updates are wanted: nothing is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/*


# /opt/build has pip and what builds the wheel, and stays behind. /opt/torch holds PyTorch and what it needs, alone, so
# that another source neither installs it again nor makes another of the image's large layer.
FROM python AS torch
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/build \
 && python3 -m venv --without-pip /opt/torch
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt /src/
# A further index that pip looks into; pip reads the variable itself.
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip --python /opt/torch/bin/python install --constraint /src/constraints.txt torch


# /opt/lovasz holds the rest, and sees /opt/torch by a path file.
FROM torch AS build
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip install --constraint /src/constraints.txt hatchling \
 && python3 -m venv --without-pip /opt/lovasz \
 && site='import sysconfig; print(sysconfig.get_path("purelib"))' \
 && /opt/torch/bin/python -c "$site" > "$(/opt/lovasz/bin/python -c "$site")/torch.pth"
WORKDIR /src
COPY . .
# The label's version is an argument; another than the package's is refused.
ARG VERSION=0.1.0
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && wheel="/dist/lovasz-${VERSION}-py3-none-any.whl" \
 && { test -e "$wheel" || { echo "VERSION is ${VERSION}, but the wheel is $(ls /dist)" >&2; exit 1; }; } \
 && /opt/build/bin/pip --python /opt/lovasz/bin/python install --constraint constraints.txt "${wheel}[server,cpu,gpu,otel]" \
 && /opt/lovasz/bin/python -c 'import lovasz.server.server'


FROM python
# On a GPU, Triton builds its launcher with a C compiler when the server first starts there.
# hadolint ignore=DL3008
RUN if [ -d /usr/local/cuda ]; then \
      apt-get update \
      && apt-get install --yes --no-install-recommends gcc libc6-dev libpython3-dev \
      && rm -rf /var/lib/apt/lists/* \
      && include="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')" \
      && gcc -fsyntax-only -I "$include" -include Python.h -x c /dev/null; \
    fi
RUN groupadd --gid 10001 lovasz \
 && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin lovasz \
 && install --directory --owner 10001 --group 10001 /var/cache/lovasz /run/lovasz
COPY --from=torch /opt/torch /opt/torch
COPY --from=build /opt/lovasz /opt/lovasz

# LD_LIBRARY_PATH: the base's would put its CUDA libraries before those that PyTorch was built with; what is left is
# where some container platforms mount the driver. no_grpc_proxy: the health check asks no proxy.
ENV PATH=/opt/lovasz/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    no_grpc_proxy=127.0.0.1,localhost \
    NUMBA_CACHE_DIR=/var/cache/lovasz/numba \
    TRITON_CACHE_DIR=/var/cache/lovasz/triton \
    LOVASZ_LISTEN=0.0.0.0:50051 \
    LOVASZ_METRICS_LISTEN=0.0.0.0:9095

ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="lovasz-server" \
      org.opencontainers.image.description="The Lovász losses and their gradients as a gRPC service for distributed trainers of segmentation networks" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}"

# By number, so that an orchestrator can see that it is not root. The root may be read-only: only compiled code is
# written, to /var/cache/lovasz, and Unix sockets, if LOVASZ_LISTEN names some, to /run/lovasz. Where the first cannot be
# written to, the code is compiled at each start (half a minute).
USER 10001:10001
EXPOSE 50051 9095
STOPSIGNAL SIGTERM
# The port is that of LOVASZ_LISTEN. Exit 1 also when the server answers but its device does not compute.
HEALTHCHECK --interval=10s --timeout=10s --start-period=600s --retries=3 \
    CMD ["lovasz", "ping", "127.0.0.1:50051", "--count", "1", "--timeout", "3"]
ENTRYPOINT ["lovasz-server"]
