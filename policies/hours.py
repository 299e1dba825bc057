"""`time:` conditions: hours, days and dates as a clock on a wall in some zone shows them.

A window that runs over midnight (`from` above `to`) belongs to the day on which it begins.
The standard library reads a zone's rules when a policy is loaded; otherwise there is no I/O here.
"""

import re
from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from policies.document import Section, nearest
from policies.request import AccessRequest

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_CLOCK = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])|24:00")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NO_TIME: Final = -1
_ONE_DAY = timedelta(days=1)


def read_hours(section: Section) -> tuple[Callable[[AccessRequest], bool], str]:
    """Return the predicate that a `time:` mapping is, and what it says in words."""
    zone = _zone(section)
    days = _days(section)
    begin, end = _clock(section, "from", "00:00"), _clock(section, "to", "24:00")
    since, until = _date(section, "since"), _date(section, "until")
    if begin == end != _NO_TIME:
        section.fault("to", "equals from: no instant is in between; leave both out for whole days")
    if since and until and until < since:
        section.fault("until", "is before since; exchange them")
    if not any(key in section for key in ("days", "from", "to", "since", "until")):
        section.fault("zone", "alone says nothing; add days, from and to, since or until")
    section.finish()

    def holds(request: AccessRequest) -> bool:
        local = datetime.fromtimestamp(request.now, zone)
        day, minute = local.date(), local.hour * 60 + local.minute
        if begin > end and minute < end:
            day -= _ONE_DAY  # the window began yesterday
        elif not (begin <= minute < end or (begin > end and minute >= begin)):
            return False
        return (
            day.weekday() in days
            and (since is None or since <= day)
            and (until is None or day <= until)
        )

    return holds, _in_words(section)


def _in_words(section: Section) -> str:
    said = [(key, section.value(key)) for key in ("days", "from", "to", "since", "until", "zone")]
    words = []
    for key, value in said:
        if value is not None:
            data = value.data
            texts = [str(each.data) for each in data] if isinstance(data, list) else [str(data)]
            words.append(f"{key} " + ",".join(texts))
    return " ".join(words)


def _zone(section: Section) -> ZoneInfo:
    name = section.string("zone")
    try:
        if name:
            return ZoneInfo(name)
    except (KeyError, OSError, ValueError):
        known = sorted(available_timezones())
        hint = nearest(name, known) or ", such as Europe/Paris or UTC"
        section.fault("zone", f"{name!r} is no time zone that this machine knows{hint}")
    return ZoneInfo("UTC")


def _days(section: Section) -> frozenset[int]:
    if "days" not in section:
        return frozenset(range(7))
    found: set[int] = set()
    for each in section.strings("days"):
        first, _, last = each.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            section.fault("days", f"holds {each!r}; write {', '.join(DAYS)}, or mon-fri")
            continue
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found.update(n % 7 for n in range(begin, end + 1 + (7 if end < begin else 0)))
    return frozenset(found)


def _clock(section: Section, key: str, default: str) -> int:
    text = section.string(key, default)
    if _CLOCK.fullmatch(text) is None:
        section.fault(key, f'{text!r} is no time of day; write it quoted, from "00:00" to "24:00"')
        return _NO_TIME
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


def _date(section: Section, key: str) -> date | None:
    if key not in section:
        return None
    text = section.string(key)
    try:
        if _DAY.fullmatch(text):  # Python takes more spellings than people do
            return date.fromisoformat(text)
    except ValueError:
        pass
    section.fault(key, f"{text!r} is no day; write it as 2026-01-31")
    return None
