# The server, without PyTorch: docker build --tag limelight:0.1.0 .
# docs/deployment.md says how it is run. Nothing here needs BuildKit; podman and buildah build it too.

# Python 3.11, which the tests run on. What is installed is the same whatever the base: constraints.txt has it.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /source
# What is installed goes into an environment that holds no pip; what installs it stays in this stage.
RUN python -m venv /opt/build && python -m venv --without-pip /opt/limelight
COPY constraints.txt ./
RUN /opt/build/bin/pip install --no-cache-dir --constraint constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY model ./model
COPY export ./export
COPY serve ./serve
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel . \
    && /opt/build/bin/pip --python /opt/limelight/bin/python install --no-cache-dir --constraint constraints.txt \
        "$(ls /wheel/limelight-*.whl)[serve,tracing]"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="limelight" \
    org.opencontainers.image.description="Serves small sequence-to-sequence models over gRPC, with their attention." \
    org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/limelight /opt/limelight
# All networks, because a container has its own. Every other setting is as it is outside: a variable goes before the
# TOML file, so what stood here nobody could set there. A read-only root leaves /tmp to be written to.
ENV PATH=/opt/limelight/bin:$PATH \
    HOME=/tmp \
    LIMELIGHT_SERVE_HOST=0.0.0.0 \
    PYTHONUNBUFFERED=1
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /
EXPOSE 50051 9100
STOPSIGNAL SIGTERM
# At the port of LIMELIGHT_SERVE_PORT; who sets it elsewhere, or serves TLS, gives --health-cmd.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "serve.probe"]
ENTRYPOINT ["limelight"]
CMD ["serve", "/models"]
