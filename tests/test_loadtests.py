"""The load tests themselves: every kind of client against a real server, the figures, and the peers' servers.

Nothing here imports Locust, which replaces parts of the standard library: it runs in the generator's process.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from darkroom.jobs import GenerationRequest
from fastapi.testclient import TestClient

from benchmarks.peers import Peer
from benchmarks.peers.plain_server import create_app
from benchmarks.peers.wire import groups_of, request_of
from loadtests import compare, overload, peers
from loadtests.__main__ import CROWDS
from loadtests.__main__ import main as run_loadtests
from loadtests.overload import Visit, analyse, free_times
from loadtests.report import Report, knee
from loadtests.scrape import Ticks, read_ticks
from loadtests.servers import darkroom
from loadtests.stages import Stage, Target, generate, summarise
from loadtests.traffic import BAD_CALLS, BadCall

PNG = b"\x89PNG"

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """`darkroom up` with the built-in model, on one thread so that a busy machine does not stall it."""
    with darkroom(num_threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    """On one thread, for the same reason."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Peer.as_served()
    torch.set_num_threads(num_threads)


def stage(clients: int = 8, images_s: float = 10.0, *, cpu_share: float = 0.1, **fields: Any) -> Stage:
    known: dict[str, Any] = {
        "part": "ladder", "label": f"{clients} clients", "server": "darkroom", "users": {"Mixed": clients},
        "rate": None, "seconds": 10.0, "images": int(images_s * 10), "images_s": images_s, "p50_s": 0.5, "p95_s": 1.0,
        "p99_s": 1.2, "errors": {}, "rows_per_tick": 8.0, "padded_rows_per_tick": 1.0, "cpu_share": cpu_share,
    }  # fmt: skip
    return Stage(**{**known, **fields})


def test_every_kind_of_client_gets_what_it_asks_for(target: Target) -> None:
    """Well-behaved ones get pictures and abusive ones the refusals they should."""
    kinds = {kind for _, crowd in CROWDS for kind in crowd} | {"Quick", "Fickle", "Arrivals"}
    seen = generate(target, dict.fromkeys(kinds, 1), seconds=4, warm_up_s=0, rate=2, seed=1)
    assert {sample[4] for sample in seen["samples"]} == {""}
    drawn = {name for name, _, _, images, _ in seen["samples"] if images}
    assert drawn >= {
        "steady", "mixed", "varied", "burst", "short", "quick", "fickle", "arrival", "polled job", "watched job",
    }  # fmt: skip
    assert {name for name, *_ in seen["samples"]} >= {"nonsense", "leave", "hammer", "GET job", "GET events"}
    assert seen["ticks"]["rows"] >= seen["ticks"]["ticks"] > 0
    visits = [overload.visit_of(visit) for visit in seen["visits"]]
    assert visits
    for visit in visits:
        assert visit.accepted_at is not None
        assert visit.claimed_at is not None
        assert visit.claimed_at >= visit.accepted_at


@pytest.mark.parametrize("call", BAD_CALLS, ids=lambda call: call.name)
def test_nonsense_is_refused_with_the_right_status(target: Target, call: BadCall) -> None:
    reply = httpx.post(
        f"{target.url}/generate", content=call.content, headers={"Content-Type": call.content_type}, timeout=30
    )
    assert reply.status_code == call.status, reply.text[:300]


def test_a_ladder_ends_in_a_report_that_can_be_compared(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    words = ["--url", target.url, "--metrics", *target.metrics, "--parts", "ladder", "--mix", "Quick"]
    run_loadtests([*words, "--concurrency", "1", "2", "--seconds", "2", "--warm-up-s", "0", "--out", str(directory)])
    printed = capsys.readouterr().out
    stages = json.loads((directory / "results.json").read_text())["stages"]
    assert [stage["label"] for stage in stages] == ["1 client", "2 clients"]
    for found in stages:
        assert found["errors"] == {}
        assert found["images_s"] == pytest.approx(found["images"] / found["seconds"])
        assert 0 < found["p50_s"] <= found["p95_s"] <= found["p99_s"] < 2.5
        assert 1 <= found["rows_per_tick"] <= found["users"]["Quick"]
        assert 0 < found["cpu_share"] < 1
        assert f"{found['images_s']:.2f}" in printed
    assert (directory / "ladder.png").read_bytes().startswith(PNG)
    assert "![Load ladder](ladder.png)" in (directory / "report.md").read_text()
    assert len((directory / "stages.csv").read_text().splitlines()) == 3
    compare.main([str(directory), str(directory)])
    assert capsys.readouterr().out.count("1.00") == 10


def test_an_unknown_kind_of_client_is_named(target: Target) -> None:
    with pytest.raises(RuntimeError, match=r"Mixed.*'Nobody:1'"):
        generate(target, {"Nobody": 1})


class FullOnce(BaseHTTPRequestHandler):
    """Refuses every body once, for a second, and draws it when it comes again."""

    seen: list[tuple[float, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        came_before = any(body == earlier for _, earlier in self.seen)
        self.seen.append((time.monotonic(), body))
        if came_before:
            self._answer(200, PNG, {"Content-Type": "image/png", "Darkroom-Job-Id": "7"})
        else:
            self._answer(429, b'{"code": "queue_full"}', {"Retry-After": "1"})

    def do_GET(self) -> None:
        moments = {"created_at": "2026-01-01T00:00:01Z", "started_at": "2026-01-01T00:00:02Z"}
        self._answer(200, json.dumps(moments).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_refused_arrival_comes_back_at_retry_after_with_the_same_bytes() -> None:
    FullOnce.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), FullOnce) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        seen = generate(Target("full once", url), {"Arrivals": 1}, rate=20, seconds=0.5, warm_up_s=0)
        server.shutdown()
    visits = [overload.visit_of(visit) for visit in seen["visits"]]
    assert {visit.told_s for visit in visits} == {(1.0,)}
    assert {visit.claimed_at - visit.accepted_at for visit in visits if visit.claimed_at and visit.accepted_at} == {1.0}
    bodies = [body for _, body in FullOnce.seen]
    assert len(bodies) == 2 * len(set(bodies)) == 2 * len(visits)
    for body in set(bodies):
        refused, accepted = (at for at, earlier in FullOnce.seen if earlier == body)
        assert accepted - refused >= 0.98


def test_only_what_ended_within_the_window_counts_and_failures_have_no_latency() -> None:
    seen = {
        "started_at": 100.0, "seconds": 10.0, "users": {"LongTail": 2}, "rate": None, "cpu_s": 2.0,
        "ticks": Ticks(ticks=5, rows=40, padded_rows=10, images=4)._asdict(),
        "samples": [
            ("short", 99.0, 9.0, 1, ""), ("short", 101.0, 1.0, 1, ""), ("long", 105.0, 3.0, 2, ""),
            ("short", 106.0, 0.1, 1, "429 queue_full"), ("GET job", 107.0, 0.2, 0, ""), ("short", 111.0, 9.0, 1, ""),
        ],
        "visits": [],
    }  # fmt: skip
    found = summarise(seen, part="users", label="two", server="darkroom")
    assert (found.images, found.images_s) == (3, 0.3)
    assert (found.p50_s, found.p95_s, found.p99_s) == (1.0, 3.0, 3.0)
    assert found.errors == {"429 queue_full": 1}
    assert (found.rows_per_tick, found.padded_rows_per_tick, found.cpu_share) == (8.0, 2.0, 0.2)
    assert found.by_name["short"]["calls"] == 2
    assert found.by_name["short"]["p95_s"] == 1.0


def test_rows_per_tick_add_up_over_workers_and_subtract_over_time() -> None:
    text = "\n".join((
        "# TYPE darkroom_tick_rows histogram",
        'darkroom_tick_rows_bucket{{le="+Inf"}} {ticks}', "darkroom_tick_rows_count {ticks}",
        "darkroom_tick_rows_sum {rows}", "# TYPE darkroom_padded_rows_total counter",
        "darkroom_padded_rows_total {padded}", "",
    ))  # fmt: skip
    before = read_ticks([text.format(ticks=10, rows=20, padded=0)])
    after = read_ticks([text.format(ticks=14, rows=40, padded=2), text.format(ticks=4, rows=20, padded=6)])
    gained = after.since(before)
    assert (gained.rows_per_tick, gained.padded_rows_per_tick) == (5.0, 1.0)
    assert before.since(before).rows_per_tick is None


def test_the_knee_is_the_least_load_with_nearly_all_throughput() -> None:
    stages = [stage(1, 4.0), stage(8, 9.1), stage(16, 10.0), stage(64, 9.5)]
    assert knee(stages) is stages[1]
    assert knee([stage(1, 0.0)]) is None


def test_a_generator_that_takes_part_in_the_result_is_pointed_out() -> None:
    report = Report({})
    report.stages = [stage(cpu_share=0.3)]
    assert not any("WARNING" in note for note in report.notes())
    report.stages.append(stage(cpu_share=0.6))
    assert any("WARNING" in note for note in report.notes())


def test_two_runs_are_compared_stage_by_stage() -> None:
    a = {"stages": [stage(8).to_json(), stage(16).to_json()]}
    b = {"stages": [stage(8, 12.0, p95_s=0.5, rows_per_tick=None, errors={"500": 2}).to_json(), stage(32).to_json()]}
    (row,) = compare.compare(a, b)
    assert row["stage"] == "ladder · darkroom · 8 clients"
    assert (row["images_s"], row["p95_s"], row["rows_per_tick"]) == (pytest.approx(1.2), 0.5, None)
    assert row["errors"] == (0, 2)
    assert compare.ratio(0.0, 5.0) is None


def test_darkroom_is_set_beside_each_peer_at_the_same_load() -> None:
    stages = [
        stage(8, 12.0, part="peers", p95_s=0.5),
        stage(8, 4.0, part="peers", server="LitServe", p95_s=2.0),
        stage(32, 4.0, part="peers", server="LitServe"),
        stage(8, 0.0, part="peers", server="broken", p95_s=None),
    ]
    assert [(figure.name, figure.value) for figure in peers.advantages(stages)] == [
        ("peers, 8 clients, darkroom over LitServe, images/s", 3.0),
        ("peers, 8 clients, darkroom over LitServe, p95", 0.25),
    ]


def visit(arrived: float, *told: float | None, accepted: float | None, claimed: float | None) -> Visit:
    latency = None if accepted is None else 1.0
    return Visit(arrived, told, (0.01,) * len(told), accepted_at=accepted, claimed_at=claimed, latency_s=latency)


def test_a_place_is_free_for_a_client_when_all_before_it_could_have_had_one() -> None:
    visits = [
        visit(0.0, accepted=0.0, claimed=1.0),
        visit(0.1, accepted=0.1, claimed=3.0),
        visit(0.3, 2.0, accepted=3.5, claimed=6.0),
        visit(0.2, 1.0, accepted=1.2, claimed=4.0),
        visit(5.0, accepted=5.0, claimed=7.0),
        visit(5.1, 9.0, accepted=None, claimed=None),
    ]
    # Two places: the first two find one; by arrival the fourth is next, at the first claim, then the third.
    assert free_times(visits, 2) == [0.0, 0.1, 3.0, 1.0, 5.0, 6.0]
    assert free_times(visits[:2] + visits[5:], 1) == [0.0, 1.0, 5.1]
    assert free_times([visits[5]] * 2, 1)[1] is None


def test_over_waits_are_relative_to_the_wait_told() -> None:
    visits = [
        visit(0.0, accepted=0.0, claimed=1.0),
        visit(0.1, 2.0, accepted=2.0, claimed=4.0),  # its place was free at 1.0: waited 1.0 too long, told 2.0
        visit(0.2, 1.0, 3.0, accepted=4.4, claimed=8.0),  # free at 4.0: 0.4 too long, told 4.0; not on the first retry
        visit(0.3, None, accepted=3.0, claimed=5.0),
    ]
    found = analyse(
        visits, max_queue_jobs=1, saturated=stage(p95_s=0.5), fickle=stage(images_s=5.0), offered_images_s=30.0,
        errors={},
    )  # fmt: skip
    assert (found.clients, found.refused, found.refused_without_retry_after, found.never_accepted) == (4, 3, 1, 0)
    assert found.accepted_on_first_retry == pytest.approx(2 / 3)
    assert (found.median_over_wait, found.p95_over_wait) == (pytest.approx(0.1), pytest.approx(0.5))
    assert found.latency_ratio == 2.0


def test_requests_share_a_call_of_a_pipeline_only_if_it_can_draw_them_together() -> None:
    def of(**fields: Any) -> GenerationRequest:
        return request_of({"prompt": "a duck", "num_inference_steps": 20, "guidance_scale": 5.0, **fields})

    requests = [
        of(seed=1),
        of(num_inference_steps=8),
        of(prompt="a cat", seed=2),
        of(guidance_scale=1.0),
        of(guidance_scale=0.0),
        of(width=96),
        of(sampler="euler"),
        of(guidance_scale=7.0),
    ]
    assert groups_of(requests) == [[0, 2], [1], [3, 4], [5], [6], [7]]


def test_a_peer_draws_the_same_picture_in_a_group_as_alone(peer: Peer) -> None:
    requests = [
        request_of({"prompt": prompt, "seed": seed, "num_inference_steps": 4})
        for seed, prompt in enumerate(("a duck in a forest", "a cat at night"))
    ]
    together = peer.draw_group(requests)
    for request, image in zip(requests, together, strict=True):
        alone = np.asarray(peer.draw(request), dtype=int)
        assert np.abs(np.asarray(image, dtype=int) - alone).mean() < 2
    assert np.abs(np.asarray(together[0], dtype=int) - np.asarray(together[1], dtype=int)).mean() > 10


def test_the_plain_server_answers_with_a_picture(peer: Peer) -> None:
    with TestClient(create_app(peer)) as client:
        reply = client.post("/generate", json={"prompt": "a duck", "num_inference_steps": 2, "seed": 1})
    assert reply.headers["content-type"] == "image/png"
    assert reply.content.startswith(PNG)
