# Two stages: what builds stays behind. glibc only; several wheels have no musl build.
FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements/build.txt requirements/runtime.txt ./
RUN python -m venv /build/tools && /build/tools/bin/pip install --require-hashes --no-deps -r build.txt
# Without pip: the environment that serves can install nothing.
RUN python -m venv --without-pip /opt/veklom \
 && /build/tools/bin/pip --python /opt/veklom/bin/python install --require-hashes --no-deps -r runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY policies policies
COPY keys keys
RUN /build/tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir dist .
RUN /build/tools/bin/pip --python /opt/veklom/bin/python install --no-index --no-deps dist/*.whl \
 && /opt/veklom/bin/python -m compileall -q /opt/veklom

FROM python:3.13-slim
RUN useradd --system --uid 10001 veklom && mkdir -p /var/lib/veklom && chown veklom /var/lib/veklom
COPY --from=build /opt/veklom /opt/veklom
COPY config.yaml /etc/veklom/config.yaml
ENV VEKLOM_CONFIG=/etc/veklom/config.yaml VEKLOM_STATE_DIR=/var/lib/veklom/state VEKLOM_AUDIT_DIR=/var/lib/veklom/audit
USER veklom
# The shipped configuration listens on loopback only: mount one of your own (README, "In a container").
EXPOSE 8080 8081
VOLUME /var/lib/veklom
# The admin listener as shipped; give another check where yours has another address or a certificate.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s \
  CMD ["/opt/veklom/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8082/livez', timeout=4)"]
ENTRYPOINT ["/opt/veklom/bin/veklom"]
CMD ["serve"]
