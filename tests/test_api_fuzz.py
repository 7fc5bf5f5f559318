"""No call that a stranger can think of, and nothing that lies in Redis, does more than be refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from darkroom.config import Settings
from darkroom.errors import JobError
from darkroom.jobs import MESSAGE_VERSION, BatchView, Failure, Job, ModelCard, Result, decode, encode
from darkroom.queue import JobQueue
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.api_fuzzer import fuzz, num_cases
from tests.support.http import served
from tests.support.instant_worker import InstantWorker
from tests.support.jobs import make_card, make_job, make_result

KINDS: list[type[Any]] = [Job, ModelCard, Result, Failure, BatchView]
MESSAGES = [make_job(), make_card(), make_result([b"picture"]), Failure(code="job_failed", message="no")]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.timeout(180)
async def test_schemathesis_finds_no_fault_in_any_surface(settings: Settings, queue: JobQueue, tmp_path: Path) -> None:
    """No 5xx, no status, header or body that the OpenAPI document does not tell of; `make fuzz-api` looks longer."""
    async with InstantWorker(queue).running(), served(settings, queue) as site:
        code, said = await fuzz(site.port, cases_per_call=4, seed=1, directory=tmp_path)
    assert code == 0, said
    (tested,) = re.findall(r"Tested: (\d+)", said)
    assert int(tested) > 40
    assert num_cases(said) > 1000


def decoded(data: bytes, kind: type[Any]) -> Any:
    """A message, or None for one that is refused as it should be."""
    refusal = None
    try:
        message = decode(data, kind)
    except JobError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code == "bad_message"
        assert len(str(refusal)) < 200
        return None
    assert isinstance(message, kind)
    assert message.version == MESSAGE_VERSION
    return message


@hypothesis_settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(KINDS))
def test_any_bytes_are_a_message_or_refused(data: bytes, kind: type[Any]) -> None:
    decoded(data, kind)


@hypothesis_settings(max_examples=500, deadline=None)
@given(st.sampled_from(MESSAGES), st.binary(max_size=20), st.integers(0, 400), st.integers(0, 20))
def test_a_damaged_message_is_a_message_or_refused(message: Any, noise: bytes, start: int, cut: int) -> None:
    whole = encode(message)
    decoded(whole[:start] + noise + whole[start + cut :], type(message))
    assert decoded(whole, type(message)) == message


@hypothesis_settings(max_examples=500, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_a_message_with_a_changed_field_is_a_message_or_refused(message: Any, data: st.DataObject) -> None:
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(VALUES)
    decoded(msgspec.msgpack.encode(fields), type(message))
