"""What a decision costs: 10 rules, 1,000 rules of which 10 may apply, CEL, replay and compiling.

`make bench-policy`. Figures are the least of several runs: others use this machine, too.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway.commands.recorded import read_decisions
from policies.engine import decide
from policies.facts import to_record
from policies.known import Known
from policies.replay import replay
from policies.request import AccessRequest, ModelCall, Operation, Principal
from policies.rules import PolicySet, load_policy_set

KNOWN = Known.of(["openai", "anthropic"])
REPLAYED = 100_000

# Ten rules that all may concern the call: nothing tells them apart but what they look at.
TEN = """\
rules:
  - {id: d1, effect: deny, match: {model: ["*-preview", "o1-*"]}}
  - {id: d2, effect: deny, match: {tools: ["computer*"]}}
  - {id: d3, effect: deny, match: {not: {client_address: ["10.0.0.0/8", "2001:db8::/32"]}}}
  - {id: d4, effect: deny, match: {labels: [secret, export]}}
  - {id: r1, effect: require, match: {generates: true}, that: {max_tokens: {max: 8192}}}
  - {id: r2, effect: require, match: {roles: contractor}, that: {amr: mfa}}
  - {id: r3, effect: require, match: {stream: true}, that: {body_bytes: {max: 1MiB}}}
  - {id: a1, effect: allow, match: {roles: admin}}
  - {id: a2, effect: allow, match: {roles: support, model: "*-mini"}}
  - {id: a3, effect: allow, match: {roles: engineer, model: ["gpt-5*", "claude-*"]}}
"""
OTHERS = "".join(
    f"  - {{id: x{n:04}, effect: {effect}, match: {{{key}: {key}-{n}, roles: engineer}}}}\n"
    for n, (effect, key) in enumerate([("allow", "tenant"), ("deny", "model")] * 495)
)
IN_CEL = """\
rules:
  - {id: d, effect: deny, when: 'labels.exists(l, l in ["secret", "export"])'}
  - {id: a, effect: allow, when: '"engineer" in roles && model.startsWith("gpt-5") && max_tokens <= 8192'}
"""
CALL = AccessRequest(
    principal=Principal(
        issuer="https://login.example.com", subject="alice", tenant="acme", roles=frozenset({"engineer", "x"})
    ),
    call=ModelCall(
        provider="openai", operation=Operation.CHAT, model="gpt-5-mini", stream=True, generates=True,
        max_tokens=1000, tools=("Bash", "Edit", "Read"), parameters=("model", "messages"), body_bytes=20_000,
    ),
    client_address="10.1.2.3", session_id="ab" * 16, now=1_800_000_000.0,
)  # fmt: skip


def microseconds(work: Callable[[], object], times: int = 2000) -> float:
    """Return what one run of `work` takes."""
    best = float("inf")
    for _ in range(15):
        began = time.perf_counter()
        for _ in range(times):
            work()
        best = min(best, time.perf_counter() - began)
    return best / times * 1e6


def compiled(text: str) -> PolicySet:
    policy_set = load_policy_set([("p.yaml", text)], KNOWN)
    assert decide(policy_set, CALL).is_allowed
    return policy_set


def main() -> None:
    ten, thousand, cel = compiled(TEN), compiled(TEN + OTHERS), compiled(IN_CEL)
    denied = load_policy_set(
        [("p.yaml", TEN + OTHERS + "  - {id: z, effect: deny, match: {stream: true}}\n")], KNOWN
    )
    few = microseconds(lambda: decide(ten, CALL))
    many = microseconds(lambda: decide(thousand, CALL))
    print(f"10 rules                        {few:8.1f} µs")
    print(f"1,000 rules, 10 may apply       {many:8.1f} µs   {many / few:.2f} times")
    print(f"1,000 rules, denied             {microseconds(lambda: decide(denied, CALL)):8.1f} µs")
    print(f"2 rules in CEL                  {microseconds(lambda: decide(cel, CALL)):8.1f} µs")
    print(f"facts for the record            {microseconds(lambda: to_record(CALL)):8.1f} µs")
    load = microseconds(lambda: load_policy_set([("p.yaml", TEN + OTHERS)], KNOWN), 1) / 1e3
    print(f"compiling 1,000 rules           {load:8.1f} ms")
    measure_replay(thousand)


def measure_replay(candidate: PolicySet) -> None:
    """Read a log as the journal writes it, and find what was planted: one call in a thousand."""
    model = msgspec.structs.replace(CALL.call, model="o1-preview")
    planted = msgspec.structs.replace(CALL, call=model)
    lines = []
    for number in range(REPLAYED):
        asked = planted if number % 1000 == 7 else CALL
        line = {
            "type": "call.start",
            "call": f"c{number}",
            "tenant": "acme",
            "rules": ["a3"],
            "facts": to_record(asked),
        }
        lines.append(msgspec.json.encode(line))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "0.jsonl"
        log.write_bytes(b"\n".join(lines) + b"\n")
        began = time.perf_counter()
        report = replay(read_decisions(log), candidate)
        seconds = time.perf_counter() - began
    assert (report.decisions, report.total("denied"), report.total("allowed")) == (
        REPLAYED,
        REPLAYED // 1000,
        0,
    )
    print(
        f"replaying {REPLAYED:,} decisions   {seconds:8.1f} s    {report.total('denied')} planted, all found"
    )


if __name__ == "__main__":
    main()
