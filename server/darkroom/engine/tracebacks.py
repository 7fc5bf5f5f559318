"""What an error keeps alive."""

from __future__ import annotations

import traceback


def release_frames(error: BaseException) -> None:
    """Let go of the variables of the calls that an error ended, and of the errors behind it.

    Otherwise the tensors of a failed attempt hold their memory while the next one needs it. Log the error before.
    """
    seen, waiting = set[int](), [error]
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            waiting += [behind for behind in (current.__cause__, current.__context__) if behind is not None]
