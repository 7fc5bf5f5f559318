"""One frozen `Settings`, read once from `DARKROOM_*` variables and passed in.

Each field's description says what raising it does. A bad value stops start-up with a `ConfigError` that names the
variable, the value and what is accepted.
"""

from __future__ import annotations

import importlib
import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from darkroom.errors import ConfigError, shorten

BUILTIN_MODEL = Path(__file__).parent / "models" / "emoji-world"
"""What a request means that names no model, where several are served."""
_ORIGIN = re.compile(r"\*|https?://[a-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")
_RESULT_STORE = re.compile(
    r"file:///[^?#]+|(s3|gs)://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[a-zA-Z0-9._-]+)*/?"
)


def builtin_models() -> list[Path]:
    """The folders of the models that come with Darkroom, the default one first: served where no other is named."""
    folders = sorted(index.parent for index in BUILTIN_MODEL.parent.glob("*/model_index.json"))
    return [BUILTIN_MODEL, *(folder for folder in folders if folder != BUILTIN_MODEL)]


def default_data_dir() -> Path:
    return Path.home() / ".local" / "share" / "darkroom"


# Redis pays for each write of each busy worker: at ten a second some hundred workers would fill it with nothing else.
CHECKPOINT_WRITE_S = 0.25


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="DARKROOM_", frozen=True, extra="ignore")

    data_dir: Path = Field(default_factory=default_data_dir, description="Where the embedded Redis keeps its data.")
    redis_url: str | None = Field(None, description="Redis to use; unset starts a private redis-server.")
    redis_maxmemory_bytes: int = Field(
        1 << 30, ge=8 << 20, description="Memory limit of the private redis-server; raising it holds more pictures."
    )
    durability: Literal["fsync", "relaxed", "replicated"] = Field(
        "fsync",
        description="What `accepted` must survive: fsync is a crash of the machine, relaxed the same but for the last "
        "second, replicated the loss of the server (an external Redis with replicas). The private Redis does as it is "
        "told; an external one is inspected, and a shortfall logged.",
    )
    durability_replicas: int = Field(
        1,
        ge=1,
        le=8,
        description="Replicas that must have a job before it is accepted, where durability is replicated; raising it "
        "survives more losses, and accepts nothing while fewer follow.",
    )
    shard: str = Field("0", pattern=r"^[a-zA-Z0-9_-]{1,32}$", description="Hash tag of this queue's keys.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_prompts: bool = Field(False, description="Whether the line of an accepted job shows its prompts.")
    tracing: Literal["off", "on"] = Field(
        "off", description="on sends traces to the collector of OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra `tracing`."
    )

    auth: Literal["off", "keys"] = Field(
        "off", description="keys asks every caller for an API key of `darkroom keys create`."
    )
    allow_anonymous: bool = Field(
        False, description="Whether the API may be reached from other machines while it asks for no keys."
    )
    api_key: SecretStr | None = Field(
        None, description="Key that `darkroom generate` and `darkroom models` show to the server of --url."
    )
    host: str = Field("127.0.0.1", description="Address the API binds to.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API binds to; 0 picks a free one.")
    cors_origins: str | None = Field(
        None,
        description="Web pages of other sites that may call the API from a browser, as https://one.example,"
        "https://two.example, or * for all.",
    )
    model_aliases: str | None = Field(
        None,
        description="Other names that OpenAI's API knows models by, as gpt-image-2=emoji-world,dall-e-3=emoji-world: "
        "for applications whose model is fixed.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address the metrics endpoints bind to.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of a process's metrics; 0 picks a free one.")
    metrics_public: bool = Field(
        False, description="Whether the API's own port serves /metrics too, for all who reach it."
    )
    wait_timeout_s: float = Field(
        120.0, gt=0, le=3600, description="How long POST /generate waits before it answers 202; raising it holds calls."
    )
    disconnect_grace_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="How long a job with an Idempotency-Key goes on once its waiting client has left; raising it gives "
        "clients more time to come back.",
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, le=1 << 28, description="Largest request body read.")
    max_image_bytes: int = Field(
        16 << 20, ge=1024, le=1 << 28, description="Largest request body read that brings pictures."
    )
    max_image_pixels: int = Field(
        1 << 25,
        ge=1 << 16,
        le=1 << 26,
        description="Most pixels of a picture that is sent; raising it costs up to 9 bytes each while one is decoded.",
    )
    max_prompt_chars: int = Field(8000, ge=1, le=32000, description="Longest prompt or negative prompt.")
    max_prompt_chunks: int = Field(
        8,
        ge=1,
        le=64,
        description="Longest prompt or negative prompt with weights, in chunks of 75 tokens; raising it costs memory.",
    )
    max_num_inference_steps: int = Field(200, ge=1, le=1000, description="Most steps one request may ask for.")
    max_num_images: int = Field(16, ge=1, le=64, description="Most images one request may ask for.")
    max_job_cost: float = Field(
        float(1 << 28), gt=0, description="Most model rows × evaluations × latent pixels one request may cost."
    )
    max_queue_jobs: int = Field(1000, ge=1, le=1_000_000, description="Jobs waiting before new ones are answered 429.")
    tenant_queue_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of DARKROOM_MAX_QUEUE_JOBS that jobs of one tenant may take; raising it leaves others less "
        "room. Without API keys there is one tenant, which may take all.",
    )

    prompt_denylist: Path | None = Field(
        None, description="File of words, phrases and /patterns/, one a line; a prompt that has one is refused."
    )
    prompt_hook: str | None = Field(
        None, description="module:function that is given each prompt and says whether it may be drawn."
    )
    picture_hook: str | None = Field(
        None,
        description="module:function that is given each picture's pixels and its request, and returns the pixels to "
        "keep.",
    )
    mark_source: bool = Field(
        True, description="Whether pictures say in their metadata that a model made them (IPTC digitalSourceType)."
    )
    c2pa_cert: Path | None = Field(
        None,
        description="Certificate chain in PEM; with the key, pictures get a C2PA signature; needs the extra `c2pa`.",
    )
    c2pa_key: Path | None = Field(
        None, validate_default=True, description="Private key of DARKROOM_C2PA_CERT in PEM, without a password."
    )

    result_store: str | None = Field(
        None,
        description="Where finished images are kept: unset is Redis, else file:///directory, s3://bucket/prefix or "
        "gs://bucket/prefix.",
    )
    result_urls: Literal["proxy", "signed"] = Field(
        "proxy",
        description="proxy hands images out itself; signed redirects GET /jobs/{job_id}/images/{index} to a signed URL "
        "of the bucket.",
    )
    result_store_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="How long a worker tries to store a job's images before the job fails; raising it rides out longer "
        "outages.",
    )
    result_ttl_s: int = Field(900, ge=10, le=86400 * 7, description="How long finished images are kept.")
    job_ttl_s: int = Field(3600, ge=60, le=86400 * 30, description="How long a finished job's record is kept.")
    lease_s: float = Field(
        15.0, ge=0.5, le=600, description="Silence after which a worker's jobs are given to another."
    )
    checkpoint_interval_s: float = Field(
        2.0,
        ge=0,
        le=3600,
        description="Seconds between two checkpoints of a running image, which a lost worker costs at most; raising it "
        "writes less to Redis, 0 counts no seconds. With both 0 they are written only when a worker drains.",
    )
    checkpoint_steps: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Steps between two checkpoints of a running image, where those come before the seconds; 0 counts "
        "no steps.",
    )
    preview_interval_s: float = Field(
        0.25,
        ge=0.02,
        le=60,
        description="Seconds between two previews of a job that somebody watches; raising it costs less throughput.",
    )
    preview_steps: int = Field(
        1, ge=1, le=1000, description="Steps between two previews of an image, at least; raising it shows fewer."
    )
    max_failures: int = Field(
        3,
        ge=1,
        le=20,
        description="Unclean losses after which a job is dead-lettered. After two, and before the last, it runs alone; "
        "with 1 it never does, and one that ends its worker takes all beside it along.",
    )

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Weights and activations of UNet and text encoder; auto is fp16 on a GPU."
    )
    attention: Literal["auto", "sdpa", "cudnn", "flash", "efficient", "triton", "xformers", "reference"] = Field(
        "auto",
        description="Attention of the UNet: auto, sdpa, cudnn, flash, efficient, triton, xformers or reference; the "
        "autoencoder takes the same, or auto where that cannot hold its one wide head. With cudnn, flash and efficient "
        "prompts have one chunk at most.",
    )
    kernels: Literal["auto", "triton", "gate", "torch"] = Field(
        "auto",
        description="Implementation of norms, gates and sampler steps: auto, triton, gate (triton, but the product "
        "before a gate is torch's) or torch; auto is the fastest measured, else gate, on a GPU that can.",
    )
    graphs: Literal["auto", "off"] = Field(
        "auto", description="auto captures ticks as CUDA graphs at start; off launches every kernel by itself."
    )
    graph_sizes: str | None = Field(
        None, description="More picture sizes to capture, as 768x512,512x512; each adds start-up time and memory."
    )
    vae_dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="Weights and activations of the autoencoder; auto is fp16 on a GPU unless that overflows or "
        "batching is reproducible, and on a CPU bf16 where the UNet is.",
    )
    vae_tile_px: int = Field(
        1536,
        ge=128,
        le=8192,
        description="Longest side decoded in one piece, larger pictures in tiles; raising it costs memory.",
    )
    memory_budget_bytes: int = Field(
        0, ge=0, description="GPU memory that a worker may plan with; 0 is what is free when it starts, less a margin."
    )
    batching: Literal["fast", "reproducible"] = Field(
        "fast", description="reproducible pads every tick to one row bucket, so pictures are bit-equal in any crowd."
    )
    compile: Literal["off", "on"] = Field(
        "off", description="on lets torch.compile take the UNet over once it is ready; needs a C++ compiler on a CPU."
    )
    max_rows: int = Field(32, ge=2, le=512, description="Most model rows in one tick; raising it costs memory.")
    reproducible_rows: int = Field(8, ge=2, le=512, description="The one row bucket of reproducible mode.")
    prompt_cache_bytes: int = Field(256 << 20, ge=0, description="Prompt embeddings kept for each model; 0 keeps none.")
    num_threads: int = Field(0, ge=0, le=1024, description="CPU threads of a worker; 0 is one per core.")
    encode_threads: int = Field(2, ge=1, le=64, description="Threads that compress finished images.")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        name, _, index = value.partition(":")
        if name not in ("auto", "cpu", "cuda") or (index and (name != "cuda" or not index.isdigit())):
            raise ValueError("expected auto, cpu, cuda or cuda:N")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _known_origins(cls, value: str | None) -> str | None:
        for origin in value.split(",") if value else ():
            if _ORIGIN.fullmatch(origin.strip()) is None:
                raise ValueError("expected origins as https://one.example,http://localhost:3000, or *")
        return value

    @field_validator("model_aliases")
    @classmethod
    def _known_aliases(cls, value: str | None) -> str | None:
        for pair in value.split(",") if value else ():
            if not all(part.strip() for part in pair.partition("=")):
                raise ValueError(f"expected pairs as gpt-image-2=emoji-world, got {shorten(pair)}")
        return value

    @field_validator("result_store")
    @classmethod
    def _known_store(cls, value: str | None) -> str | None:
        if value is not None and _RESULT_STORE.fullmatch(value) is None:
            raise ValueError("expected file:///directory, s3://bucket/prefix or gs://bucket/prefix")
        return value

    @field_validator("result_urls")
    @classmethod
    def _signable(cls, value: str, info: ValidationInfo) -> str:
        # A store that was itself refused is not among the data.
        if value == "signed" and (info.data.get("result_store") or "file:").startswith("file:"):
            raise ValueError("expected proxy: only a bucket in DARKROOM_RESULT_STORE has signed URLs")
        return value

    @field_validator("c2pa_key")
    @classmethod
    def _of_a_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("c2pa_cert") is None):
            raise ValueError("expected DARKROOM_C2PA_CERT and DARKROOM_C2PA_KEY, or neither")
        return value

    @field_validator("graph_sizes")
    @classmethod
    def _known_sizes(cls, value: str | None) -> str | None:
        for size in value.split(",") if value else ():
            sides = size.strip().split("x")
            if len(sides) != 2 or not all(side.isdecimal() and 8 <= int(side) <= 8192 for side in sides):
                raise ValueError(f"expected sizes as 768x512,512x512 (width x height in pixels), got {shorten(size)}")
        return value

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """Each origin in `cors_origins`."""
        return tuple(origin.strip() for origin in self.cors_origins.split(",")) if self.cors_origins else ()

    @property
    def models_by_alias(self) -> dict[str, str]:
        """Model id by each name of `model_aliases`."""
        pairs = (pair.partition("=") for pair in self.model_aliases.split(",")) if self.model_aliases else ()
        return {alias.strip(): model.strip() for alias, _, model in pairs}

    @property
    def graph_sizes_px(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each size in `graph_sizes`."""
        sizes = (size.strip().split("x") for size in self.graph_sizes.split(",")) if self.graph_sizes else ()
        return tuple(dict.fromkeys((int(width), int(height)) for width, height in sizes))

    def refuse_open_door(self) -> None:
        """Raise `ConfigError` when other machines could reach an API that asks for no keys, unless they are let in."""
        if self.auth == "keys" or self.allow_anonymous or _is_loopback(self.host):
            return
        raise ConfigError(
            f"DARKROOM_HOST={self.host} lets other machines in, and without keys anyone of them may do everything: set "
            "DARKROOM_AUTH=keys and make keys with `darkroom keys create`, or DARKROOM_ALLOW_ANONYMOUS=true if "
            "something in front of it decides who may come"
        )

    @property
    def checkpoint_write_s(self) -> float:
        """How long a state that was made may wait until it is written. `checkpoint_interval_s` has room for it."""
        return min(CHECKPOINT_WRITE_S, self.checkpoint_interval_s / 2) or CHECKPOINT_WRITE_S

    @property
    def suspect_failures(self) -> int:
        """Unclean losses after which a job runs alone, so that it takes no others along."""
        return max(1, min(2, self.max_failures - 1))

    @property
    def redis_dir(self) -> Path:
        return self.data_dir / "redis"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_hook(setting: str, target: str) -> Callable[..., Any]:
    """The function that `target`, `module:function`, names. Raises `ConfigError`."""
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}={target}: expected module:function, and that module to be importable") from error
    if not callable(found):
        raise ConfigError(f"{setting}={target}: that is no function")
    function: Callable[..., Any] = found
    return function


def load_settings(**overrides: object) -> Settings:
    """Read the settings. `overrides` win over the environment. Raises `ConfigError` on the first bad value."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"DARKROOM_{name.upper()}={shorten(first.get('input'))}: {first['msg']}") from error
