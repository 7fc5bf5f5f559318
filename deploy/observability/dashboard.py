"""The Grafana dashboard: what it shows, and the JSON that Grafana reads.

    python -m deploy.observability.dashboard    # writes grafana/dashboards/darkroom.json

It is read from top to bottom: are users happy, where is the time, are the GPUs full, what is failing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PATH = Path(__file__).parent / "grafana" / "dashboards" / "darkroom.json"
COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and how its series are called: label names in double braces."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """`unit` is Grafana's name of it; `width` and `height` are in its grid of 24 columns."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat"] = "timeseries"
    is_stacked: bool = False
    # Where a stat turns yellow and red; falling values are bad where the second is the smaller.
    thresholds: tuple[float, float] | None = None
    # A line that values are compared with.
    limit: float | None = None
    width: int = 6
    height: int = 7


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def _rate(metric: str, labels: str = "") -> str:
    return f"rate(darkroom_{metric}{labels}[$__rate_interval])"


def _by(label: str, metric: str, labels: str = "") -> Query:
    return Query(f"sum by ({label}) ({_rate(metric, labels)})", f"{{{{{label}}}}}")


def _mean(metric: str, legend: str) -> Query:
    return Query(f"sum({_rate(f'{metric}_sum')}) / sum({_rate(f'{metric}_count')})", legend)


def _quantile(quantile: float, metric: str, legend: str, labels: str = "") -> Query:
    return Query(f"histogram_quantile({quantile}, sum by (le) ({_rate(f'{metric}_bucket', labels)}))", legend)


def _happened(metric: str, legend: str) -> Query:
    return Query(f"sum(increase(darkroom_{metric}[$__rate_interval]))", legend)


def _good(slo: str) -> Query:
    bad, all_ = (f'avg_over_time(darkroom:slo_{kind}:rate5m{{slo="{slo}"}}[$__range])' for kind in ("bad", "all"))
    return Query(f"1 - {bad} / {all_}")


def _stat(title: str, description: str, query: Query, unit: str, thresholds: tuple[float, float] | None) -> Panel:
    return Panel(title, description, (query,), unit, "stat", thresholds=thresholds, width=4, height=4)


_CALLS = '{route!~"/health/.*|/metrics"}'
_PARTS = (
    ("queue_wait_seconds", "waiting"),
    ("encode_seconds", "text encoding"),
    ("denoise_seconds", "denoising"),
    ("decode_seconds", "decoding"),
    ("image_encode_seconds", "compression"),
)

ROWS = (
    Row(
        "Are users happy?",
        (
            _stat(
                "Availability",
                "Share of accepted jobs and refused calls that did not fail for a reason of ours. Objective: 99.9 %.",
                _good("availability"),
                "percentunit",
                (0.9995, 0.999),
            ),
            _stat(
                "In time",
                "Share of finished jobs that took no longer than 10 s from acceptance to their end; jobs that missed "
                "their own deadline count as late. Objective: 95 %.",
                _good("latency"),
                "percentunit",
                (0.97, 0.95),
            ),
            _stat(
                "Pictures per second",
                "Finished by all workers.",
                Query(f"sum({_rate('images_total')})"),
                "short",
                None,
            ),
            _stat(
                "Oldest wait",
                "Age of the oldest job that no worker has taken yet.",
                Query("max(darkroom_queue_oldest_wait_seconds)"),
                "s",
                (60, 120),
            ),
            _stat(
                "Live workers",
                "Workers whose heartbeat is alive.",
                Query("max(darkroom_live_workers)"),
                "short",
                (1.5, 0.5),
            ),
            _stat(
                "Alerts",
                "Alerts of Darkroom that are firing.",
                Query('count(ALERTS{alertname=~"Darkroom.+",alertstate="firing"}) or vector(0)'),
                "short",
                (0.5, 1.5),
            ),
            Panel(
                "How fast the error budget burns",
                "1 uses the budget up in just the objective's period. 14.4 over an hour calls somebody.",
                (Query("darkroom:slo_burn:ratio_rate1h", "{{slo}}, last hour"),),
                limit=14.4,
            ),
            Panel(
                "Time from acceptance to end",
                "Of jobs that succeeded.",
                tuple(
                    _quantile(quantile, "job_duration_seconds", f"p{quantile * 100:.0f}", '{outcome="succeeded"}')
                    for quantile in (0.5, 0.95, 0.99)
                ),
                "s",
            ),
            Panel(
                "Jobs by how they ended",
                "Per second, in the whole queue, and how many were accepted.",
                (Query(f"max by (state) ({_rate('queue_jobs_total')})", "{{state}}"),),
            ),
            Panel(
                "HTTP calls by status",
                "Per second, health checks left out.",
                (_by("status", "http_requests_total", _CALLS),),
                is_stacked=True,
            ),
            Panel(
                "Time to answer HTTP calls, p95",
                "By route. POST /generate waits for its pictures unless asked not to.",
                (
                    Query(
                        "histogram_quantile(0.95, sum by (le, route) "
                        f"({_rate('http_request_duration_seconds_bucket', _CALLS)}))",
                        "{{route}}",
                    ),
                ),
                "s",
            ),
            Panel(
                "Refused and failed calls by code",
                "Per second. queue_full, tenant_queue_full and deadline_unmet are 429s that say when to come back.",
                (Query(f"sum by (reason) ({_rate('rejects_total')}) > 0", "{{reason}}"),),
                is_stacked=True,
            ),
            Panel(
                "How waiting calls ended",
                "Per second. handed_over got a 202 with the job's URL; abandoned means that the client left.",
                (_by("outcome", "jobs_answered_total"),),
                is_stacked=True,
            ),
            Panel(
                "Jobs that were abandoned",
                "Per second: cancelled because their clients had left and did not come back with their key in time.",
                (Query(f"sum({_rate('jobs_abandoned_total')})", "abandoned"),),
            ),
            Panel(
                "Accepted jobs by priority",
                "Per second.",
                (_by("priority", "jobs_accepted_total"),),
                is_stacked=True,
            ),
        ),
    ),
    Row(
        "Where is the time?",
        (
            Panel(
                "Mean time of a job by part",
                "Waiting for a worker, text encoding, denoising, VAE decode, compression of the pictures.",
                tuple(_mean(metric, legend) for metric, legend in _PARTS),
                "s",
                is_stacked=True,
            ),
            Panel(
                "p95 of each part",
                "The slowest twentieth of jobs, part by part.",
                tuple(_quantile(0.95, metric, legend) for metric, legend in _PARTS),
                "s",
            ),
            Panel(
                "Jobs waiting and running",
                "Waiting by model, and held by workers.",
                (
                    Query("max by (model) (darkroom_queue_depth)", "{{model}} waiting"),
                    Query("max(darkroom_queue_in_flight)", "running"),
                ),
            ),
            Panel(
                "Time of a call to the result store, p95",
                "By operation; none while pictures are kept in Redis.",
                (
                    Query(
                        f"histogram_quantile(0.95, sum by (le, operation) ({_rate('result_store_seconds_bucket')}))",
                        "{{operation}}",
                    ),
                ),
                "s",
            ),
            Panel(
                "Backlog",
                "How long the live workers need for what waits. More workers come when this stays high.",
                (Query("max by (model) (darkroom_queue_backlog_seconds)", "{{model}}"),),
                "s",
            ),
            Panel(
                "Tenants with waiting jobs",
                "And how many the one with most has waiting: others keep their share of the workers all the same.",
                (
                    Query("max(darkroom_queue_tenants)", "tenants"),
                    Query("max(darkroom_queue_largest_tenant_jobs)", "jobs of the largest"),
                ),
            ),
            Panel(
                "Oldest wait",
                "Age of the oldest waiting job. From two minutes on callers have stopped waiting.",
                (Query("max(darkroom_queue_oldest_wait_seconds)", "oldest"),),
                "s",
            ),
            Panel(
                "HTTP calls being answered",
                "By process.",
                (Query("sum by (instance) (darkroom_http_requests_in_flight)", "{{instance}}"),),
            ),
            Panel(
                "Time to start",
                "Of each worker's last start: to load weights, then to warm up.",
                (
                    Query("max by (model) (darkroom_model_load_seconds)", "load {{model}}"),
                    Query("max(darkroom_warm_up_seconds)", "warm up"),
                ),
                "s",
            ),
        ),
    ),
    Row(
        "Are the GPUs full?",
        (
            Panel(
                "Model rows in a tick",
                "A tick is one call of the UNet; a picture with guidance has two rows in it.",
                (
                    _mean("tick_rows", "mean"),
                    _quantile(0.5, "tick_rows", "p50"),
                    _quantile(0.95, "tick_rows", "p95"),
                ),
            ),
            Panel(
                "Padding",
                "Rows computed only to fill a batch shape: per tick, and as a share of all that was computed.",
                (
                    _mean("tick_padded_rows", "mean rows in a tick"),
                    _quantile(0.95, "tick_padded_rows", "p95 rows in a tick"),
                    Query(
                        f"sum({_rate('padded_rows_total')}) / "
                        f"(sum({_rate('padded_rows_total')}) + sum({_rate('tick_rows_sum')}))",
                        "share of all rows",
                    ),
                ),
            ),
            Panel(
                "Time of a tick by row bucket",
                "Mean: gather, UNet, guidance, sampler update.",
                (
                    Query(
                        f"sum by (bucket) ({_rate('tick_seconds_sum')}) / sum by (bucket) "
                        f"({_rate('tick_seconds_count')})",
                        "{{bucket}} rows",
                    ),
                ),
                "s",
            ),
            Panel(
                "Share of time in ticks",
                "By worker. Well below 1 under load means that something keeps the GPU waiting.",
                (Query(f"sum by (instance) ({_rate('tick_seconds_sum')})", "{{instance}}"),),
                "percentunit",
            ),
            Panel(
                "Ticks per second",
                "By worker.",
                (_by("instance", "ticks_total"),),
                is_stacked=True,
            ),
            Panel(
                "Pictures that join and leave the batch",
                "Per second, between ticks. ended_early: cancelled, failed or past the deadline.",
                (Query(f"sum({_rate('rows_joined_total')})", "joined"), _by("reason", "rows_left_total")),
            ),
            Panel(
                "Pictures that a tick left waiting",
                "Per tick. other_shape: another size or model had its turn; no_room: the tick was full; no_slot: no "
                "place for their latents; kept_apart: a worker was lost with them, or with the others.",
                (
                    Query(
                        f"sum by (reason) ({_rate('rows_not_taken_total')}) / scalar(sum({_rate('ticks_total')}))",
                        "{{reason}}",
                    ),
                ),
                is_stacked=True,
            ),
            Panel(
                "Rows held and rows that a tick can take",
                "Over all workers.",
                (
                    Query("sum(darkroom_resident_rows)", "held"),
                    Query("sum(darkroom_max_model_rows)", "most in a tick"),
                ),
            ),
            Panel(
                "Pictures per second",
                "By worker.",
                (_by("instance", "images_total"),),
                is_stacked=True,
            ),
            Panel(
                "Denoising steps per second",
                "One for each picture and UNet evaluation, by worker.",
                (_by("instance", "row_steps_total"),),
                is_stacked=True,
            ),
            Panel(
                "Pixels per second",
                "Of finished pictures, by worker.",
                (_by("instance", "pixels_total"),),
                is_stacked=True,
            ),
            Panel(
                "Prompts found in the cache",
                "Share of prompts that needed no text encoding.",
                (
                    Query(
                        f"""sum({_rate("prompt_cache_requests_total", '{outcome="hit"}')}) / """
                        f"sum({_rate('prompt_cache_requests_total')})",
                        "hits",
                    ),
                ),
                "percentunit",
            ),
            Panel(
                "GPU utilisation",
                "Share of time in which a kernel ran. High with small ticks still leaves room.",
                (Query("max by (gpu) (darkroom_gpu_utilization_ratio)", "{{gpu}}"),),
                "percentunit",
            ),
            Panel(
                "GPU memory",
                "Total and used by everybody; kept by torch, and held by its tensors.",
                (Query("max by (gpu, kind) (darkroom_gpu_memory_bytes)", "{{gpu}} {{kind}}"),),
                "bytes",
            ),
            Panel(
                "GPU power", "What each draws.", (Query("max by (gpu) (darkroom_gpu_power_watts)", "{{gpu}}"),), "watt"
            ),
            Panel(
                "GPU temperature",
                "A hot GPU lowers its clock.",
                (Query("max by (gpu) (darkroom_gpu_temperature_celsius)", "{{gpu}}"),),
                "celsius",
            ),
        ),
    ),
    Row(
        "What is failing?",
        (
            Panel(
                "Jobs by how a worker ended them",
                "Per second.",
                (_by("outcome", "jobs_finished_total"),),
            ),
            Panel(
                "Failed jobs by code",
                "Per second.",
                (_by("code", "jobs_failed_total"),),
                is_stacked=True,
            ),
            Panel(
                "Work that changed hands",
                "Leases lost by workers, jobs taken back from lost workers, and jobs claimed again.",
                (
                    _happened("leases_lost_total", "leases lost"),
                    _happened("redeliveries_total", "redelivered"),
                    _happened('jobs_claimed_total{delivery="again"}', "claimed again"),
                ),
            ),
            Panel(
                "Work that was saved",
                "Pictures whose state was copied out, those that went on from such a copy, and the steps they need not "
                "do again.",
                (
                    _happened("checkpoints_total", "checkpoints"),
                    _happened("resumes_total", "resumed"),
                    _happened("steps_saved_total", "steps saved"),
                ),
            ),
            Panel(
                "Previews",
                "Previews made of running pictures that somebody watched, from the linear map and by the autoencoder.",
                (Query("sum by (kind) (rate(darkroom_previews_total[$__rate_interval]))", "{{kind}}"),),
            ),
            Panel(
                "Dead letters",
                "Jobs given up because too many workers were lost while they ran: now, and on the stream.",
                (
                    _happened("dead_letters_total", "new"),
                    Query("max(darkroom_queue_dead_letters)", "on the stream"),
                ),
            ),
            Panel(
                "Out of memory, not finite",
                "Ticks and decodes without memory, pictures that came out as NaN, autoencoders that overflowed.",
                (
                    Query("sum by (where) (increase(darkroom_out_of_memory_total[$__rate_interval]))", "OOM {{where}}"),
                    Query("sum by (where) (increase(darkroom_non_finite_total[$__rate_interval]))", "NaN {{where}}"),
                    Query(
                        "sum by (where) (increase(darkroom_non_finite_recovered_total[$__rate_interval]))",
                        "NaN {{where}}, recovered",
                    ),
                    _happened("vae_upcasts_total", "VAE to fp32"),
                ),
            ),
            Panel(
                "Starts of each process",
                "Within a quarter of an hour; more than two are an alert.",
                (Query('changes(process_start_time_seconds{job=~"darkroom-.+"}[15m])', "{{job}} {{instance}}"),),
            ),
            Panel(
                "Workers by state",
                "Starting, ready, draining.",
                (Query("sum by (state) (darkroom_worker_state)", "{{state}}"),),
                is_stacked=True,
            ),
            Panel(
                "Redis memory",
                "Used, promised to accepted jobs, and the limit. At 80 % new jobs are refused.",
                (
                    Query("max by (kind) (darkroom_redis_memory_bytes)", "{{kind}}"),
                    Query("max(darkroom_queue_reserved_bytes)", "promised"),
                ),
                "bytes",
            ),
            Panel(
                "Result store: failed calls",
                "Per second, by operation; none while pictures are kept in Redis.",
                (_by("operation", "result_store_errors_total"),),
                is_stacked=True,
            ),
            Panel(
                "Redis answers",
                "1 while it answers this API process.",
                (Query("min by (instance) (darkroom_queue_reachable)", "{{instance}}"),),
            ),
            Panel(
                "Redis refuses",
                "Commands that Redis answered with an error, and jobs and results that too few replicas had in time.",
                (
                    _by("reason", "redis_refusals_total"),
                    Query(
                        "sum by (kind) (rate(darkroom_not_replicated_total[$__rate_interval]))",
                        "{{kind}} not replicated",
                    ),
                ),
                is_stacked=True,
            ),
            Panel(
                "What Redis keeps through a crash",
                "fsync: every job it answered for; relaxed: all but the last second; rarely: up to its last snapshot.",
                (Query("max by (state) (darkroom_redis_durability) > 0", "{{state}}"),),
            ),
            Panel(
                "GPU errors (Xid)",
                "Reported by the driver, by number.",
                (
                    Query(
                        "sum by (gpu, xid) (increase(darkroom_gpu_xid_errors_total[$__rate_interval]))",
                        "{{gpu}} Xid {{xid}}",
                    ),
                ),
            ),
            Panel(
                "Memory of each process",
                "Resident, on the host.",
                (Query('process_resident_memory_bytes{job=~"darkroom-.+"}', "{{job}} {{instance}}"),),
                "bytes",
            ),
            Panel(
                "Processes by version",
                "More than one while a release rolls out.",
                (Query("count by (version) (darkroom_build_info)", "{{version}}"),),
                is_stacked=True,
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Placed:
    """A panel, or the title of a row, at its place in the grid."""

    x: int
    y: int
    width: int
    height: int
    panel: Panel | None
    title: str


def placed(rows: tuple[Row, ...] = ROWS) -> Iterator[Placed]:
    """Everything from top to bottom; panels fill lines of 24 columns from the left."""
    y = 0
    for row in rows:
        yield Placed(0, y, COLUMNS, 1, None, row.title)
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            yield Placed(x, y, panel.width, panel.height, panel, panel.title)
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _steps(panel: Panel) -> list[dict[str, Any]]:
    if panel.thresholds is None:
        return [{"color": "green", "value": None}]
    warn, bad = panel.thresholds
    if bad > warn:
        return [{"color": c, "value": v} for c, v in (("green", None), ("yellow", warn), ("red", bad))]
    return [{"color": c, "value": v} for c, v in (("red", None), ("yellow", bad), ("green", warn))]


def _panel_json(number: int, place: Placed) -> dict[str, Any]:
    common = {
        "id": number,
        "title": place.title,
        "gridPos": {"x": place.x, "y": place.y, "w": place.width, "h": place.height},
    }
    panel = place.panel
    if panel is None:
        return {**common, "type": "row", "collapsed": False, "panels": []}
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": _steps(panel)}}
    if panel.kind == "stat":
        options: dict[str, Any] = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
        }
    else:
        defaults |= {"min": 0, "custom": {"fillOpacity": 10, "showPoints": "never", "spanNulls": False}}
        if panel.is_stacked:
            defaults["custom"] |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
        if panel.limit is not None:
            defaults["custom"]["thresholdsStyle"] = {"mode": "line"}
            defaults["thresholds"]["steps"].append({"color": "red", "value": panel.limit})
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        **common,
        "type": panel.kind,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expr, "legendFormat": query.legend, "datasource": _DATASOURCE}
            for i, query in enumerate(panel.queries)
        ],
    }


def dashboard() -> str:
    """The dashboard's JSON. Its datasource is a variable, so that it can be imported anywhere."""
    document = {
        "uid": "darkroom",
        "title": "Darkroom",
        "tags": ["darkroom"],
        "description": "Are users happy, where is the time, are the GPUs full, what is failing.",
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [{"name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel_json(number, place) for number, place in enumerate(placed(), start=1)],
    }
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(dashboard())
