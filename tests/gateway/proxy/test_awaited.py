"""What calls wait for is asked for once, and nobody waits for ever."""

from gateway.errors import Refused
from gateway.proxy.awaited import Awaited


def unavailable() -> Refused:
    """Return what those are told who waited in vain."""
    return Refused("store_unavailable", "no")


class House:
    """Something awaited, what was asked for, and what each waiting call was told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.told: list[tuple[str, str]] = []
        self.awaited = Awaited(self.asked.append, 5.0, unavailable)

    def wait(self, key: str, who: str, now: float = 0.0) -> None:
        """Let a call wait."""
        self.awaited.wait(
            key, lambda refusal: self.told.append((who, refusal.code if refusal else "")), now
        )


def test_asks_once_for_all() -> None:
    """Calls that wait for the same thing are told together, and the next one asks anew."""
    house = House()
    for key, who in (("a", "one"), ("a", "two"), ("b", "three")):
        house.wait(key, who)
    assert house.asked == ["a", "b"]
    house.awaited.arrived("a", is_known=True)
    assert house.told == [("one", ""), ("two", "")]
    house.awaited.arrived("a", is_known=True)
    house.awaited.arrived("b", is_known=False)
    assert house.told[2:] == [("three", "store_unavailable")]
    house.wait("a", "four")
    assert house.asked == ["a", "b", "a"]


def test_nobody_waits_for_ever() -> None:
    """Past its time what is awaited is given up, and not before."""
    house = House()
    house.wait("a", "one", now=10.0)
    house.wait("b", "two", now=12.0)
    house.awaited.sweep(15.0)
    assert house.told == []
    house.awaited.sweep(15.1)
    assert house.told == [("one", "store_unavailable")]
    assert list(house.awaited) == ["b"]


def test_asks_again_where_whoever_was_asked_is_gone() -> None:
    """Everything that is still awaited is asked for once more."""
    house = House()
    house.wait("a", "one")
    house.wait("b", "two")
    house.awaited.arrived("a", is_known=True)
    house.awaited.ask_again()
    assert house.asked == ["a", "b", "b"]
