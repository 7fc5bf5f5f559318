"""The batcher's policy, with an injected clock and no tensors."""

import itertools

import pytest
from darkroom.engine.batcher import Batcher, BatchKey, Candidate, row_buckets

SMALL, LARGE = BatchKey("m", 8, 8), BatchKey("m", 16, 16)
_ids = itertools.count()


def row(key=SMALL, *, model_rows=2, rank=1, remaining=10, since=0.0, deadline=None, joined=0.0):
    return Candidate(next(_ids), key, model_rows, rank, remaining, since, deadline, joined)


def test_rows_of_one_tenant_do_not_hold_up_the_row_of_another():
    """However urgent: where not all find room, the first of each goes before the second of any."""
    greedy = [row(rank=2, remaining=1) for _ in range(6)]
    small = row(rank=0, remaining=50)
    for candidate in greedy:
        candidate.tenant = "greedy"
    choice = Batcher((8,)).choose([*greedy, small], 0.0)
    assert choice is not None
    assert choice.ids == (greedy[0].id, small.id, greedy[1].id, greedy[2].id)


def test_there_is_no_choice_without_rows():
    assert Batcher((2, 4)).choose([], 0.0) is None


def test_rows_of_one_shape_share_a_tick_and_are_padded_to_a_bucket():
    rows = [row(), row(model_rows=1)]
    choice = Batcher((2, 4, 8)).choose(rows, 0.0)
    assert choice is not None
    assert set(choice.ids) == {r.id for r in rows}
    assert (choice.model_rows, choice.bucket) == (3, 4)


def test_rows_of_two_shapes_never_share_a_tick():
    rows = [row(SMALL), row(LARGE)]
    choice = Batcher((8,)).choose(rows, 0.0)
    assert choice is not None
    assert len(choice.ids) == 1


def test_rows_that_found_no_memory_together_come_half_as_many():
    batcher = Batcher((1, 2, 4, 8))
    rows = [row() for _ in range(4)]
    assert batcher.choose(rows, 0.0).bucket == 8
    assert batcher.halve(SMALL, 8) == 4
    assert batcher.choose(rows, 0.0).bucket == 4
    assert batcher.halve(SMALL, 4) == 2
    assert batcher.halve(SMALL, 2) == 1
    assert batcher.choose(rows, 0.0).bucket == 2, "a guided row cannot be halved"
    assert batcher.halve(SMALL, 1) is None
    assert batcher.choose([row(LARGE) for _ in range(4)], 0.0).bucket == 8
    assert Batcher((6,)).halve(SMALL, 6) is None


def test_an_unguided_row_fills_the_last_model_row():
    rows = [row(remaining=1), row(remaining=2), row(model_rows=1, remaining=3)]
    choice = Batcher((3,)).choose(rows, 0.0)
    assert choice is not None
    assert choice.ids == (rows[0].id, rows[2].id)


def test_a_higher_class_goes_before_a_shorter_job():
    short, urgent = row(remaining=1), row(rank=2, remaining=50)
    choice = Batcher((2,)).choose([short, urgent], 0.0)
    assert choice is not None
    assert choice.ids == (urgent.id,)


def test_a_tight_deadline_goes_before_a_shorter_job():
    short, tight, loose = row(remaining=1), row(remaining=50, deadline=5.0), row(remaining=2, deadline=50.0)
    choice = Batcher((4,)).choose([short, loose, tight], 0.0)
    assert choice is not None
    assert choice.ids == (tight.id, loose.id)


def test_slack_counts_the_work_that_is_left():
    batcher = Batcher((2,))
    batcher.account(SMALL, 1.0, 1)
    late_but_short, sooner_needed = row(remaining=1, deadline=20.0), row(remaining=19, deadline=21.0)
    choice = batcher.choose([late_but_short, sooner_needed], 0.0)
    assert choice is not None
    assert choice.ids == (sooner_needed.id,)


def test_the_shortest_remaining_goes_first():
    long, short = row(remaining=50), row(remaining=3)
    choice = Batcher((2,)).choose([long, short], 0.0)
    assert choice is not None
    assert choice.ids == (short.id,)


def test_a_long_job_is_passed_by_a_shorter_one_only_if_that_saves_more_time_than_it_came_later():
    """At a second for an evaluation, 8 seconds less to go are worth a head start of up to 8 seconds."""
    batcher = Batcher((2,))
    for _ in range(50):
        batcher.account(SMALL, 1.0, 1)
    long = row(remaining=10, since=20.0, joined=10.0)
    for joined, first in ((17.0, "short"), (19.0, "long")):
        short = row(remaining=2, since=20.0, joined=joined)
        choice = batcher.choose([long, short], 20.0)
        assert choice is not None
        assert choice.ids == ({"short": short, "long": long}[first].id,)


def test_a_row_that_waited_long_overtakes_a_higher_class():
    patient, urgent = row(rank=0, since=0.0), row(rank=2, since=15.0)
    batcher = Batcher((2,), ageing_s=5.0)
    assert batcher.choose([patient, urgent], 9.0).ids == (urgent.id,)
    assert batcher.choose([patient, urgent], 15.0).ids == (patient.id,)


def test_nobody_starves_under_an_endless_stream_of_short_jobs():
    batcher = Batcher((2,), ageing_s=1.0)
    long = row(remaining=50)
    now, ran = 0.0, 0
    for _ in range(2000):
        short = row(remaining=1, since=now)
        choice = batcher.choose([long, short], now)
        now += 0.1
        if choice.ids == (long.id,):
            ran += 1
            long.waiting_since_s = now
    assert ran >= 50


def test_shapes_share_the_machine_by_time_not_by_ticks():
    batcher = Batcher((2,))
    rows, spent = [row(SMALL), row(LARGE)], {SMALL: 0.0, LARGE: 0.0}
    for _ in range(300):
        key = batcher.choose(rows, 0.0).key
        tick_s = 0.01 if key is SMALL else 0.05
        batcher.account(key, tick_s, 1)
        spent[key] += tick_s
    assert spent[SMALL] == pytest.approx(spent[LARGE], rel=0.05)


def test_a_shape_that_was_idle_gets_no_credit_for_it():
    batcher = Batcher((2,))
    small, large = row(SMALL), row(LARGE)
    for _ in range(100):
        batcher.account(batcher.choose([small], 0.0).key, 0.01, 1)
    keys = []
    for _ in range(10):
        keys.append(batcher.choose([small, large], 0.0).key)
        batcher.account(keys[-1], 0.01, 1)
    assert keys.count(LARGE) == 5


def test_a_shape_that_comes_and_goes_owes_what_it_took() -> None:
    batcher, spent = Batcher((2,)), {SMALL: 0.0, LARGE: 0.0}
    large_is_here = True
    for _ in range(400):
        rows = [row(SMALL), row(LARGE)] if large_is_here else [row(SMALL)]
        key = batcher.choose(rows, 0.0).key
        tick_s = 0.01 if key == SMALL else 1.0
        batcher.account(key, tick_s, 1)
        spent[key] += tick_s
        large_is_here = key != LARGE
    assert spent[LARGE] <= spent[SMALL] + 1.0


def test_an_urgent_shape_gets_a_larger_share_but_not_everything():
    batcher = Batcher((2,))
    rows = [row(SMALL, rank=1), row(LARGE, rank=2)]
    keys = []
    for _ in range(100):
        keys.append(batcher.choose(rows, 0.0).key)
        batcher.account(keys[-1], 0.01, 2 if keys[-1] is LARGE else 1)
    assert 70 <= keys.count(LARGE) <= 90


@pytest.mark.parametrize("buckets", [(), (1,)])
def test_buckets_that_cannot_hold_a_guided_row_are_refused(buckets):
    with pytest.raises(ValueError, match="row buckets"):
        Batcher(buckets)


def test_reproducible_mode_has_one_bucket_and_graphs_have_powers_of_two():
    assert row_buckets(32, is_reproducible=True, reproducible_rows=8, has_graphs=False) == (8,)
    assert row_buckets(32, is_reproducible=False, reproducible_rows=8, has_graphs=True) == (1, 2, 4, 8, 16, 32)
    assert row_buckets(14, is_reproducible=False, reproducible_rows=8, has_graphs=False) == (*range(1, 9), 12, 14)


def test_rows_with_which_a_worker_was_lost_share_ticks_only_with_each_other():
    healthy = [row(remaining=3), row(remaining=4)]
    suspect = [row(remaining=5), row(remaining=6)]
    for one in suspect:
        one.is_redelivered = True
    batcher = Batcher((8,))
    assert set(batcher.choose([*suspect, *healthy], 0.0).ids) == {r.id for r in healthy}
    for one in healthy:
        one.waiting_since_s = 6.0
    assert set(batcher.choose([*suspect, *healthy], 6.0).ids) == {r.id for r in suspect}, "they are not starved"
