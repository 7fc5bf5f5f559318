"""The garbage collector of processes that serve for months."""

from __future__ import annotations

import gc


def spare_what_is_there() -> None:
    """Leave all that start-up has made out of every collection from now on. Takes tenths of a second once.

    Python looks through everything only when a quarter as many objects have been added as it kept the last time. After
    our imports that is a hundred thousand: what libraries leave in cycles behind each call would stay for hours, and
    every such collection would stop all threads for tenths of a second.
    """
    gc.collect()
    gc.freeze()
    # The next one is due by what this one keeps.
    gc.collect()
