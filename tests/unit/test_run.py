"""Interrupting a service once, twice and three times: it ends without a traceback."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app import run


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_while_it_shuts_down_ends_it_at_once(monkeypatch: pytest.MonkeyPatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(run.ray, "init", lambda **_: None)
    monkeypatch.setattr(run, "cli", interrupt)
    monkeypatch.setattr(run, "serve", SimpleNamespace(status=interrupt, shutdown=interrupt))
    try:
        with pytest.raises(SystemExit) as ended:
            run.main("config.yaml")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 130
