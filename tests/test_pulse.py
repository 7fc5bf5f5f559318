"""What may take long, and when it has taken too long."""

from __future__ import annotations

from darkroom.engine.pulse import Pulse


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run_phase(pulse: Pulse, clock: Clock, kind: str, size: float, seconds: float) -> bool:
    """Whether a phase was overdue when it had taken that long."""
    with pulse.phase(kind, size):
        clock.now_s += seconds
        return pulse.overdue() is not None


def test_nothing_is_overdue_while_nothing_runs() -> None:
    clock = Clock()
    pulse = Pulse(15.0, clock=clock)
    run_phase(pulse, clock, "turn", 1.0, 0.1)
    clock.now_s += 10_000
    assert pulse.overdue() is None


def test_a_phase_may_always_take_the_least_time() -> None:
    clock = Clock()
    pulse = Pulse(15.0, clock=clock)
    run_phase(pulse, clock, "turn", 2.0, 0.1)
    assert not run_phase(pulse, clock, "turn", 2.0, 14.9)
    assert run_phase(pulse, clock, "decode", 1.0, 601.0), "what was never measured may take ten minutes"


def test_a_phase_may_take_three_times_what_its_size_took_before() -> None:
    clock = Clock()
    pulse = Pulse(15.0, clock=clock)
    run_phase(pulse, clock, "turn", 4.0, 60.0)
    assert not run_phase(pulse, clock, "turn", 4.0, 179.0)
    assert run_phase(pulse, clock, "decode", 4.0, 601.0), "kinds know nothing of each other"


def test_a_larger_phase_may_take_longer_in_proportion() -> None:
    clock = Clock()
    pulse = Pulse(15.0, clock=clock)
    run_phase(pulse, clock, "turn", 1.0, 10.0)
    assert not run_phase(pulse, clock, "turn", 8.0, 239.0)
    pulse = Pulse(15.0, clock=clock)
    run_phase(pulse, clock, "turn", 1.0, 10.0)
    assert run_phase(pulse, clock, "turn", 8.0, 241.0)


def test_phases_of_several_threads_are_looked_at_each_by_itself() -> None:
    clock = Clock()
    pulse = Pulse(15.0, clock=clock)
    run_phase(pulse, clock, "turn", 1.0, 1.0)
    run_phase(pulse, clock, "decode", 1.0, 1.0)
    with pulse.phase("decode", 1.0):
        clock.now_s += 14.0
        with pulse.phase("turn", 1.0):
            clock.now_s += 2.0
            late = pulse.overdue()
    assert late is not None
    assert (late.kind, late.allowed_s) == ("decode", 15.0)
