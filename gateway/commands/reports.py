"""Results of policy tests, for people and for the machines that run them. No I/O."""

import json
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape, quoteattr

from policies.testing import Outcome, Seen, uncovered


def to_tree(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the results, file by file; of cases that passed only how many."""
    for suite, cases in _by_suite(outcomes):
        failed = [each for each in cases if each.differences]
        yield f"{suite}: {len(cases) - len(failed)} passed, {len(failed)} failed"
        for each in failed:
            yield f"  FAILED {each.case.name}  [{suite}:{each.case.line}]"
            yield from (f"    {difference}" for difference in each.differences)


def to_json(outcomes: Sequence[Outcome], seen: Sequence[Seen]) -> str:
    """Return the results and the coverage as JSON."""
    return json.dumps(
        {
            "tests": [
                {
                    "suite": each.case.suite,
                    "line": each.case.line,
                    "name": each.case.name,
                    "passed": not each.differences,
                    "verdict": each.decision.verdict.value,
                    "rules": list(each.decision.rules),
                    "differences": list(each.differences),
                }
                for each in outcomes
            ],
            "coverage": {"percent": percent(seen), "missing": list(uncovered(seen))},
        },
        indent=2,
    )


def to_junit(outcomes: Sequence[Outcome]) -> str:
    """Return the results as JUnit's XML, which CI systems read."""
    return "\n".join(_junit(outcomes))


def _junit(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield '<?xml version="1.0" encoding="UTF-8"?>'
    yield "<testsuites>"
    for suite, cases in _by_suite(outcomes):
        failures = sum(bool(each.differences) for each in cases)
        yield f'  <testsuite name={quoteattr(suite)} tests="{len(cases)}" failures="{failures}">'
        for each in cases:
            name = quoteattr(each.case.name)
            yield f'    <testcase name={name} file={quoteattr(suite)} line="{each.case.line}">'
            if each.differences:
                yield f"      <failure>{escape('; '.join(each.differences))}</failure>"
            yield "    </testcase>"
        yield "  </testsuite>"
    yield "</testsuites>"


def percent(seen: Sequence[Seen]) -> int:
    """Return how many of a hundred rules and conditions were seen both true and false."""
    return 100 * sum(each.is_covered for each in seen) // len(seen) if seen else 100


def _by_suite(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    suites: dict[str, list[Outcome]] = {}
    for each in outcomes:
        suites.setdefault(each.case.suite, []).append(each)
    return list(suites.items())
