from __future__ import annotations

from distill.stop import Stop


def test_a_request_stays() -> None:
    stop = Stop()
    assert not stop.requested
    stop.request()
    assert stop.requested


def test_buffers_are_saved_once() -> None:
    calls = []
    stop = Stop()
    stop.call_before_kill(lambda: calls.append(1))
    stop.save_buffers()
    stop.save_buffers()
    assert calls == [1]
