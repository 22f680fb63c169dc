"""The order of tests, and who has the machine while one runs; see conftest.py."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def settings(pytestconfig: pytest.Config) -> ModuleType:
    """conftest.py."""
    plugin = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    assert isinstance(plugin, ModuleType)
    return plugin


class Item:
    """What the order depends on of a test."""

    def __init__(self, name: str, *marks: str) -> None:
        self.name, self.path, self._marks = name, Path(name.split(":")[0]), marks

    def iter_markers(self) -> Iterator[pytest.Mark]:
        return (getattr(pytest.mark, name).mark for name in self._marks)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((mark for mark in self.iter_markers() if mark.name == name), None)


def test_what_runs_alone_comes_first_then_what_takes_long(settings: ModuleType) -> None:
    items = [
        *(Item("short:1"), Item("many:1"), Item("many:2"), Item("long:1", "long")),
        *(Item("mixed:1", "slow"), Item("mixed:2", "alone"), Item("mixed:3"), Item("mixed:4", "alone")),
    ]
    settings.pytest_collection_modifyitems(items)
    assert " ".join(item.name for item in items) == "mixed:2 mixed:4 mixed:1 mixed:3 long:1 many:1 many:2 short:1"


def test_the_machine_is_held_until_the_next_test_is_one_beside_others(
    settings: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(settings, "TOGETHER", "ANOTHER_MACHINE")
    monkeypatch.setattr(settings, "held", [])
    monkeypatch.setenv("ANOTHER_MACHINE", str(tmp_path))
    one, two, beside = Item("a", "alone"), Item("b", "alone"), Item("c")

    def passes(item: Item, then: Item | None) -> list[str]:
        """Who may run during ``item``, and after it."""
        running = settings.pytest_runtest_protocol(item, then)
        next(running)
        during = allowed(tmp_path)
        with pytest.raises(StopIteration):
            running.send(None)
        return [during, allowed(tmp_path)]

    assert passes(one, two) == ["nobody", "nobody"]
    assert passes(two, beside) == ["nobody", "all"]
    assert passes(beside, one) == ["beside", "all"]
    assert passes(one, None) == ["nobody", "all"]


def allowed(together: Path) -> str:
    """Which tests of other workers could begin now."""
    for kind, who in ((fcntl.LOCK_EX, "all"), (fcntl.LOCK_SH, "beside")):
        machine = os.open(together / "machine", os.O_WRONLY | os.O_CREAT)
        try:
            fcntl.flock(machine, kind | fcntl.LOCK_NB)
            return who
        except BlockingIOError:
            continue
        finally:
            os.close(machine)
    return "nobody"
