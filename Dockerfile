# The service's image, for every pod of k8s/. Two targets:
#
#     docker build --target cpu  --tag qwen3-serve:0.1.0-cpu  .
#     docker build --target cuda --tag qwen3-serve:0.1.0-cuda .
#
# All Python packages have the versions of constraints.txt. They come from pip's configured index; TORCH_OPTIONS is for
# pip when it installs torch, such as the index of a build without CUDA, which makes the CPU image much smaller.

FROM python:3.11.13-slim-bookworm AS build
ARG TORCH_OPTIONS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch comes first and alone: whatever depends on it then takes the build that is there.
RUN pip install --constraint constraints.txt ${TORCH_OPTIONS} torch
COPY pyproject.toml README.md ./
# Dependencies before the code: a change of the code leaves this layer as it is.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['serve'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY kernels kernels
COPY engine engine
COPY serve_app serve_app
COPY cluster cluster
COPY loadtest loadtest
RUN pip install --no-deps --constraint constraints.txt . && pip check

FROM python:3.11.13-slim-bookworm AS cpu
# The CPU operations are compiled for the machine they run on, and Triton compiles its launchers.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 serve && useradd --uid 1000 --gid 1000 --create-home serve
COPY --from=build /opt/venv /opt/venv
COPY --chmod=755 k8s/drain-node /usr/local/bin/drain-node
# A login shell, which KubeRay can be told to use, begins with a PATH of its own.
RUN echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/venv.sh
# The root file system is read-only in a pod: nothing may be compiled next to the code.
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/home/serve
# As in `make serve`: HAProxy in front, one event loop for router and replica, and replicas give way to no other process.
# An HAProxy that a new one replaced goes on for as long as a generation may take, `graceful_shutdown_timeout_s`; after
# Ray's two minutes it would cut streams.
ENV RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.ray_headers:middlewares RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=600
# KubeRay puts its own command in the place of CMD. On its own the image serves the demo model.
COPY cluster/config.yaml /opt/serve/config.yaml
# Loopback in a container is reached from nowhere.
RUN sed -i 's/host: 127.0.0.1/host: 0.0.0.0/' /opt/serve/config.yaml
USER 1000:1000
WORKDIR /home/serve
EXPOSE 8000
CMD ["python", "-m", "serve_app.run", "/opt/serve/config.yaml"]

# CUDA's libraries come with torch's wheels, the driver from the node.
FROM cpu AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
