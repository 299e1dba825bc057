"""The operational log drops what it was not told to allow."""

import json
from collections.abc import Iterator

import pytest
import structlog

from gateway.telemetry.logs import configure_logs, get_log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_unknown_keys_are_named_and_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    """A header or token handed to the log by mistake leaves its name, not its value."""
    configure_logs("json", "info", "worker-0")
    get_log().warning(
        "something", code="x", authorization="Bearer planted", headers={"a": "planted"}
    )
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["code"], line["role"]) == ("something", "x", "worker-0")
    assert line["dropped"] == ["authorization", "headers"]
    assert "planted" not in str(line)


def test_tracebacks_show_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    """A logged exception shows where it happened and no local variable, in both forms."""

    def fail(secret: str) -> None:
        raise RuntimeError(f"about {len(secret)} letters")

    for form in ("json", "console"):
        configure_logs(form, "info", "control")
        try:
            fail("detnalp"[::-1])
        except RuntimeError:
            get_log().exception("failed")
        out = capsys.readouterr().err
        assert "RuntimeError" in out
        assert "planted" not in out
        structlog.reset_defaults()


def test_the_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """What is below the level is not written."""
    configure_logs("json", "warning", "control")
    get_log().info("quiet")
    assert capsys.readouterr().err == ""
