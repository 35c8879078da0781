# Two images from one file, always named by target (deploy/README.md):
#   docker build --target cpu  --tag mithridate:cpu  .
#   docker build --target cuda --tag mithridate:cuda .
# The base is the slim one for both: torch's wheels bring the CUDA libraries, so a CUDA base would hold them twice.
ARG BASE=python:3.11-slim

# --- What to install. Only a change of these two lists, not every change of pyproject.toml, installs torch anew.
FROM ${BASE} AS requirements
WORKDIR /requirements
COPY pyproject.toml ./
RUN python -c "import tomllib; from pathlib import Path; \
project = tomllib.loads(Path('pyproject.toml').read_text())['project']; \
needs = lambda *extras: sum((project['optional-dependencies'][one] for one in extras), project['dependencies']); \
[Path(extra + '.txt').write_text('\n'.join(needs(extra, 'otel'))) for extra in ('cpu', 'gpu')]"

# --- Shared by the stages that install. pip's own variables choose index and certificates; they reach no final image.
FROM ${BASE} AS installer
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
ARG PIP_NO_CACHE_DIR=1
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Without pip inside: nothing can be installed in a running container.
RUN python -m venv --without-pip /opt/venv
WORKDIR /build

# --- The project itself, apart from its dependencies: a layer of kilobytes over one of gigabytes.
FROM installer AS project
COPY . .
RUN python -m pip --python /opt/venv/bin/python install --no-deps --prefix /project .

# --- What both images are, but for their Python environment.
FROM ${BASE} AS runtime
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Mithridate" \
      org.opencontainers.image.description="Serve an image classifier behind run-time adversarial defences" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A volume first mounted at /data takes over this owner, so `build` can write there.
RUN groupadd --gid 10001 mithridate \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mithridate \
    && install --directory --owner=10001 --group=10001 /data
# Nothing is written outside /data and /tmp: the root file system can be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MITHRIDATE_BUNDLE=/data/bundle \
    MITHRIDATE_HOST=0.0.0.0 \
    MITHRIDATE_PORT=8000
WORKDIR /tmp
EXPOSE 8000
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
# /readyz, not /livez: containers that wait for this one want answers, and a bundle that is still loading gives none.
# An engine does not restart a container for being unhealthy. Where one does, /livez belongs there. The probe goes
# through http.client because urllib would send it to whatever proxy the environment names.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; \
probe = http.client.HTTPConnection('127.0.0.1', int(os.environ['MITHRIDATE_PORT']), timeout=4); \
probe.request('GET', '/readyz'); \
sys.exit(probe.getresponse().status != 200)"]
# A Python script run directly: Python is process 1, SIGTERM reaches it, and its exit code is the container's.
ENTRYPOINT ["mithridate"]
CMD ["serve"]

# --- CPU ---
FROM installer AS dependencies-cpu
COPY constraints.txt deploy/drop_cuda.py ./
COPY --from=requirements /requirements/cpu.txt ./
# One step, or the layer below would keep what is deleted.
RUN python -m pip --python /opt/venv/bin/python install -r cpu.txt -c constraints.txt \
    && /opt/venv/bin/python drop_cuda.py \
    && /opt/venv/bin/python drop_cuda.py --check

FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/venv /opt/venv
COPY --from=project /project /opt/venv

# --- CUDA ---
FROM installer AS dependencies-cuda
COPY constraints.txt ./
COPY --from=requirements /requirements/gpu.txt ./
RUN python -m pip --python /opt/venv/bin/python install -r gpu.txt -c constraints.txt

FROM runtime AS cuda
# What the NVIDIA runtime reads; CUDA base images set it, the slim one does not.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MITHRIDATE_DEVICE=cuda
COPY --from=dependencies-cuda /opt/venv /opt/venv
COPY --from=project /project /opt/venv
