# Two stages: what builds stays behind. glibc only; several wheels have no musl build.
FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements/demo.txt requirements/runtime.txt ./
RUN python -m venv /opt/veklom && /opt/veklom/bin/pip install --require-hashes --no-deps -r demo.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY policies policies
COPY keys keys
RUN /opt/veklom/bin/pip install --no-deps --no-build-isolation . && /opt/veklom/bin/python -m compileall -q /opt/veklom

FROM python:3.13-slim
RUN useradd --system --uid 10001 veklom && mkdir -p /var/lib/veklom && chown veklom /var/lib/veklom
COPY --from=build /opt/veklom /opt/veklom
COPY config.yaml /etc/veklom/config.yaml
ENV VEKLOM_CONFIG=/etc/veklom/config.yaml VEKLOM_STATE_DIR=/var/lib/veklom/state VEKLOM_AUDIT_DIR=/var/lib/veklom/audit
USER veklom
ENTRYPOINT ["/opt/veklom/bin/veklom"]
CMD ["serve"]
