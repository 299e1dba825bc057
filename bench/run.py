"""CPU per call of the gateway and of nginx forwarding the same call, from one run.

    make bench            needs Debian's wrk and nginx-light
    .venv/bin/python bench/run.py --custody    also beside a gateway without custody

The forwarder under test runs on core 0; the upstream (nginx, refusing any call without the
provider's key) and the load (wrk) run on core 1. Rounds are interleaved, each figure is the median
of the rounds with its spread, and CPU is user + system of the whole process tree from /proc, so it
does not depend on the load client. The gateway does everything it does in production: session
token, policy, limits, two durable audit records, custody, metrics. nginx only forwards.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

KEY = "sk-bench-0123456789abcdef0123456789abcdef"
CONFIG = """\
name: bench
state_dir: {state}
listeners:
  proxy: {{address: "127.0.0.1:{proxy}"}}
  sessions: {{address: "127.0.0.1:{sessions}"}}
  admin: {{address: "127.0.0.1:{admin}"}}
providers:
  bench: {{dialect: openai, base_url: "http://127.0.0.1:{upstream}/v1", plain_http: true}}
policies: {{path: {policies}}}
audit: {{directory: {audit}}}
"""
POLICY = (
    "rules:\n"
    + "".join(
        f"""\
  - id: rule-{n}
    effect: allow
    match: {{tenant: tenant-{n}, provider: bench, model: ["gpt-*", "o{n}-*"], max_tokens: {{max: 4096}}}}
"""
        for n in range(19)
    )
    + """\
  - id: bench
    effect: allow
    match: {tenant: bench, provider: bench, model: ["gpt-*"]}
limits:
  - name: tenant-rpm
    key: [tenant]
    requests: {rate: 60000000/min, burst: 1000000}
  - name: subject-rpm
    key: [tenant, subject]
    requests: {rate: 60000000/min, burst: 1000000}
  - name: calls
    key: [tenant, session]
    concurrent: {max: 100000}
"""
)
NGINX = """\
daemon off; master_process off; worker_processes 1; error_log stderr crit; pid {dir}/{name}.pid;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000;
  client_body_temp_path {dir}/{name}-body; proxy_temp_path {dir}/{name}-proxy;
  fastcgi_temp_path {dir}/{name}-f; uwsgi_temp_path {dir}/{name}-u; scgi_temp_path {dir}/{name}-s;
  {body}
}}
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return
        time.sleep(0.02)
    sys.exit(f"nothing listens on port {port}")


def tree(pid: int) -> list[int]:
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            pids += tree(int(child))
    return pids


def cpu_seconds(pid: int) -> float:
    ticks = 0
    for each in tree(pid):
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(
    core: int, *command: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *command],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


@contextlib.contextmanager
def nginx(core: int, folder: Path, name: str, body: str) -> Iterator[subprocess.Popen[bytes]]:
    path = folder / f"{name}.conf"
    path.write_text(NGINX.format(dir=folder, name=name, body=body))
    with running(core, "nginx", "-p", str(folder), "-c", str(path)) as process:
        yield process


@contextlib.contextmanager
def veklom(
    folder: Path, upstream: int, size: int, environment: dict[str, str] | None = None
) -> Iterator[tuple[int, str, Path]]:
    """Start a gateway with an open session; yield its pid, where calls go, and wrk's script."""
    ports = {who: free_port() for who in ("proxy", "sessions", "admin")}
    (folder / "policies").mkdir(parents=True)
    (folder / "policies" / "bench.yaml").write_text(POLICY)
    config = folder / "config.yaml"
    config.write_text(
        CONFIG.format(
            state=folder / "state",
            audit=folder / "audit",
            policies=folder / "policies",
            upstream=upstream,
            **ports,
        )
    )
    program = str(Path(sys.executable).with_name("veklom"))
    command = (program, "serve", "--dev", "--config", str(config))
    with running(0, *command, environment=environment) as gateway:
        for port in ports.values():
            wait_for(port)
        sessions = f"http://127.0.0.1:{ports['sessions']}"
        identity = post(f"{sessions}/dev/token", {"subject": "bench", "tenant": "bench"})["token"]
        opened = post(f"{sessions}/v1/sessions", {"keys": {"bench": KEY}}, str(identity))
        url = f"http://127.0.0.1:{ports['proxy']}/bench/v1/chat/completions"
        yield gateway.pid, url, script(folder, "calls", str(opened["token"]), size)


def post(url: str, body: dict[str, object], token: str = "") -> dict[str, object]:
    headers = {"content-type": "application/json"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - loopback
    with urllib.request.urlopen(request) as response:  # noqa: S310 - loopback
        answer: dict[str, object] = json.load(response)
    return answer


def load(url: str, script: Path, connections: int, seconds: int) -> tuple[int, int]:
    """Return how many calls wrk made, and how many of them did not succeed."""
    command = ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds}s"]
    out = subprocess.run(
        [*command, "-s", str(script), url], capture_output=True, text=True, check=True
    ).stdout
    done = re.search(r"(\d+) requests in", out)
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
    failed = int(bad[1]) if bad else 0
    failed += sum(map(int, errors.groups())) if errors else 0
    return int(done[1]) if done else 0, failed


def script(folder: Path, name: str, token: str, size: int) -> Path:
    text = "x" * max(1, size - 90)
    body = json.dumps({"model": "gpt-5.6", "messages": [{"role": "user", "content": text}]})
    path = folder / f"{name}.lua"
    path.write_text(
        f"wrk.method='POST'\nwrk.body='{body}'\nwrk.headers['Content-Type']='application/json'\n"
        f"wrk.headers['Authorization']='Bearer {token}'\n"
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024, help="bytes of the request body")
    parser.add_argument("--custody", action="store_true", help="also beside one without custody")
    arguments = parser.parse_args()
    for tool in ("wrk", "nginx", "taskset"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is missing: apt-get install wrk nginx-light util-linux")
    with tempfile.TemporaryDirectory(prefix="veklom-bench-") as name, contextlib.ExitStack() as run:
        folder = Path(name)
        ports = {who: free_port() for who in ("upstream", "nginx")}
        reply = json.dumps(
            {
                "id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-5.6",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": "y" * 600}}],
                "usage": {"prompt_tokens": 250, "completion_tokens": 150, "total_tokens": 400},
            }
        )  # fmt: skip
        server = f"""
  server {{
    listen 127.0.0.1:{ports["upstream"]} backlog=4096; default_type application/json;
    location / {{
      if ($http_authorization != "Bearer {KEY}") {{ return 401; }}
      return 200 '{reply}';
    }}
  }}"""
        run.enter_context(nginx(1, folder, "upstream", server))
        forward = f"""
  upstream provider {{ server 127.0.0.1:{ports["upstream"]}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{ports["nginx"]} backlog=4096;
    location / {{
      proxy_pass http://provider; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Authorization "Bearer {KEY}"; proxy_buffering off;
    }}
  }}"""
        proxy = run.enter_context(nginx(0, folder, "forward", forward))
        for port in ports.values():
            wait_for(port)
        targets = {
            "nginx": (
                proxy.pid,
                f"http://127.0.0.1:{ports['nginx']}/v1/chat/completions",
                script(folder, "nginx", "none", arguments.size),
            )
        }
        gateways: dict[str, dict[str, str]] = {"veklom": {}}
        if arguments.custody:
            gateways["without"] = {"PYTHONPATH": str(Path(__file__).parent / "without_custody")}
        for who, environment in gateways.items():
            targets[who] = run.enter_context(
                veklom(folder / who, ports["upstream"], arguments.size, environment)
            )
        measure(targets, arguments.rounds, arguments.seconds)


def measure(targets: dict[str, tuple[int, str, Path]], rounds: int, seconds: int) -> None:
    for connections in (64, 1):
        figures: dict[str, list[float]] = {name: [] for name in targets}
        rates: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(rounds):
            for name, (pid, url, lua) in targets.items():
                load(url, lua, connections, 1)
                before = cpu_seconds(pid)
                done, failed = load(url, lua, connections, seconds)
                spent = cpu_seconds(pid) - before
                if failed or not done:
                    sys.exit(f"{name}: {failed} of {done} calls failed")
                figures[name].append(spent * 1000 / done)
                rates[name].append(done / seconds)
        print(
            f"\n{connections} connection{'s' if connections > 1 else ''}, {rounds} rounds of {seconds:g} s"
        )
        for name, values in figures.items():
            print(
                f"  {name:8} CPU ms/call {statistics.median(values):.4f}"
                f"  [{min(values):.4f} .. {max(values):.4f}]"
                f"   {statistics.median(rates[name]):8.0f} calls/s"
            )
        for one, other in (("veklom", "nginx"), ("veklom", "without")):
            if other in figures:
                ratio = [a / b for a, b in zip(figures[one], figures[other], strict=True)]
                print(
                    f"  ratio {one} / {other}: {statistics.median(ratio):.2f}"
                    f"  [{min(ratio):.2f} .. {max(ratio):.2f}]"
                )


if __name__ == "__main__":
    main()
