"""From a checkpoint in diffusers' layout to a `DiffusionModel` that can be served.

Only what the allow-lists name is read, only safetensors are opened, and nothing of a repository is executed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import structlog
import torch
from darkroom_kernels import check_available, head_refusal
from darkroom_kernels.backend import uses_triton
from torch import Tensor, nn

from darkroom.diffusion.layers import all_but_geglu, widened
from darkroom.diffusion.memory import ModelMemory, measure
from darkroom.diffusion.samplers import default_sampler
from darkroom.diffusion.schedule import NoiseSchedule
from darkroom.diffusion.text import TextEncoder, TextEncoders, build_text_model, load_tokenizer
from darkroom.diffusion.unet import UNet, UNetConfig
from darkroom.diffusion.vae import VAE, VAEConfig
from darkroom.diffusion.weights import content_hash, load_weights, read_json, weight_files
from darkroom.errors import ConfigError, ModelError, shorten
from darkroom.jobs import ModelCard
from darkroom.sampling import SAMPLERS, SIGMA_SCHEDULES, supported_sigma_schedules

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
# Component → the (library, class) pairs that this server builds itself; a scheduler is a config, whatever its class.
COMPONENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": (("diffusers", "AutoencoderKL"),),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "text_encoder_2": (("transformers", "CLIPTextModelWithProjection"),),
    "tokenizer": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
    "tokenizer_2": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
    "scheduler": (),
}
IGNORED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
REQUIRED_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# SD 1.x autoencoders were published with the names of an older attention class.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
log = structlog.get_logger("darkroom.diffusion")

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(@[\w./-]{1,128})?")
MAX_SIDE_PX = 2048


class ServingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`darkroom.json` beside model_index.json: a model's name, and how to sample when a request does not say."""

    id: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    sigma_schedule: str | None = None
    width: int | None = None
    height: int | None = None
    description: str = ""
    license: str = ""
    example_prompts: list[str] = []


@dataclass
class DiffusionModel:
    """A checkpoint, ready to serve: networks fused on their device, texts encodable, schedule and card read.

    `embeds_guidance` says that the UNet takes the guidance scale as an input (latent consistency models), so that one
    call does what two do elsewhere. `kernels` names the implementation of `darkroom_kernels.step` for its ticks.
    `load_vae` reads the autoencoder again, in another dtype.
    """

    id: str
    path: Path
    unet: UNet
    vae: VAE
    text: TextEncoders
    schedule: NoiseSchedule
    card: ModelCard
    device: torch.device
    dtype: torch.dtype
    load_vae: Callable[[torch.dtype], VAE]
    kernels: str = "auto"

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def condition_channels(self) -> int:
        """Channels that the UNet reads beside the latents: of an inpainting UNet the mask and the kept part's latents,
        of others none."""
        return self.unet.config.in_channels - self.latent_channels

    @property
    def vae_scale_factor(self) -> int:
        return self.vae.config.scale_factor

    @property
    def embeds_guidance(self) -> bool:
        return self.unet.config.time_cond_proj_dim is not None

    def upcast_vae(self) -> None:
        """Replace an autoencoder whose decoding overflows by one in fp32."""
        log.warning(
            "vae_overflows",
            model=self.id,
            dtype=str(self.vae.dtype).removeprefix("torch."),
            hint="decoding goes on in fp32; DARKROOM_VAE_DTYPE=fp32 does so from the start",
        )
        self.vae = self.load_vae(torch.float32)

    def widened(self) -> DiffusionModel:
        """The same model with a denoiser that has fp32's range: a copy of it in fp32 where it is in fp16, which alone
        has less."""
        if self.dtype is not torch.float16:
            return self
        unet = cast(UNet, widened(self.unet))
        unet.dtype = torch.float32
        return replace(self, unet=unet, dtype=torch.float32)

    def time_ids(self, width: int, height: int) -> Tensor | None:
        """SDXL's sizes of an uncropped picture, `[6]` fp32 on the host; None for the other families."""
        if self.unet.config.addition_time_embed_dim is None:
            return None
        return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)


def load_model(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    kernels: str = "auto",
    vae_dtype: torch.dtype | None = None,
    vae_tile_px: int | None = None,
) -> DiffusionModel:
    """Load a checkpoint from a directory, or from a hub id `org/name` or `org/name@revision`.

    `dtype` is of the UNet, and on a GPU of the text encoders; None means fp16 on a GPU and fp32 on a CPU. `vae_dtype`
    None means what `choose_vae_dtype` says; `vae_tile_px` is the largest side decoded in one piece. Weights are cast on
    the CPU, so a GPU never holds them wider than they stay. Raises `ModelError`, one sentence with the path, on what
    cannot be served as it is, and `ConfigError` on a device or an implementation that is not there.
    """
    started_s = time.monotonic()
    place = _device(device)
    try:
        check_available(attention, place)
        uses_triton(all_but_geglu(kernels), place)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
    prefer_fp16 = dtype is torch.float16
    directory = _directory(path, prefer_fp16=prefer_fp16)
    classes = _components(directory)
    scheduler_file = directory / "scheduler" / "scheduler_config.json"
    scheduler_config = read_json(scheduler_file)
    with _blaming(scheduler_file):
        schedule = NoiseSchedule.from_config(scheduler_config)
    reader = _Reader(directory, place, prefer_fp16)

    unet_config = reader.config("unet")
    unet = reader.network("unet", lambda: UNet(unet_config, attention=attention, kernels=kernels), dtype).fuse()
    vae_config = reader.config("vae")
    is_sdxl = "text_encoder_2" in classes

    def load_vae(dtype: torch.dtype) -> VAE:
        def build() -> VAE:
            config = VAEConfig.from_dict(vae_config)
            chosen = attention_for_vae(attention, config, place, dtype)
            return VAE(config, attention=chosen, kernels=kernels, tile_px=vae_tile_px)

        return reader.network("vae", build, dtype, _modern_name).fuse()  # type: ignore[no-any-return]

    vae = load_vae(vae_dtype or choose_vae_dtype(vae_config, place, dtype, is_sdxl=is_sdxl))
    text_dtype = dtype if place.type == "cuda" else torch.float32
    text = _text_encoders(reader, classes, text_dtype)
    with _blaming(directory):
        _check_that_parts_fit(unet, vae, text)
    card = _card(directory, str(path), unet, vae, text, scheduler_config, content_hash(reader.files))
    if place.type == "cuda":
        # Weights were laid out on this thread's stream; whoever uses them has another.
        torch.cuda.synchronize(place)
    log.info("model_loaded", model=card.id, device=str(place), seconds=round(time.monotonic() - started_s, 2))
    return DiffusionModel(
        id=card.id,
        path=directory,
        unet=unet,
        vae=vae,
        text=text,
        schedule=schedule,
        card=card,
        device=place,
        dtype=dtype,
        load_vae=load_vae,
        kernels=all_but_geglu(kernels),
    )


def measure_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None = None,
    vae_tile_px: int | None = None,
    kernels: str = "auto",
    sizes_px: Sequence[tuple[int, int]] = (),
) -> ModelMemory:
    """What a checkpoint will take on a GPU, from its configs alone; arguments as of `load_model`.

    `sizes_px` are (width, height) besides the model's own. Raises `ModelError`.
    """
    device = torch.device("cuda")
    directory = _directory(path, prefer_fp16=dtype is torch.float16)
    classes = _components(directory)
    reader = _Reader(directory, device, prefer_fp16=dtype is torch.float16)
    unet, vae = reader.config("unet"), reader.config("vae")
    is_sdxl = "text_encoder_2" in classes
    own = _own_defaults(directory)
    with _blaming(directory):
        size_px = _own_size(own, UNetConfig.from_dict(unet), VAEConfig.from_dict(vae), is_sdxl=is_sdxl)
        return measure(
            own.id or directory.name,
            unet,
            vae,
            [(classes[name], reader.config(name)) for name in ("text_encoder", "text_encoder_2") if name in classes],
            [size_px, *sizes_px],
            dtype=dtype,
            vae_dtype=vae_dtype or choose_vae_dtype(vae, device, dtype, is_sdxl=is_sdxl),
            vae_tile_px=vae_tile_px,
            kernels=kernels,
        )


def attention_for_vae(name: str, config: VAEConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The attention of an autoencoder beside a UNet whose attention is `name`: the same, or `auto` where that cannot
    hold the one head of the middle block, which is as wide as the block."""
    if not config.mid_block_add_attention:
        return name
    refusal = head_refusal(name, device, dtype, config.block_out_channels[-1])
    if refusal is None:
        return name
    log.info("vae_attention", asked=name, instead="auto", reason=refusal)
    return "auto"


def choose_vae_dtype(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, *, is_sdxl: bool
) -> torch.dtype:
    """The dtype of an autoencoder with this `vae/config.json`, beside a UNet in `dtype`.

    fp16 on a GPU, where it halves the traffic of the largest activations there are; in bf16 eight bits of mantissa show
    in smooth areas. fp32 there where the weights are known to overflow: SDXL's, unless `force_upcast` denies it; its
    convolutions are then TF32, which is torch's default for them and keeps fp32's range. On a
    CPU bf16 beside a UNet in bf16: 1.35 (one picture) to 1.5 times (eight) as fast, and 53 dB or more from fp32, with
    999 of 1000 values within one grey level (built-in model, 20 pictures, Zen 4). Source of the rule for SDXL:
    diffusers `StableDiffusionXLPipeline`, `needs_upcasting`; its SD 1.x and 2.x pipelines do not ask.
    """
    if device.type == "cpu":
        return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    if dtype is torch.float32 or (is_sdxl and config.get("force_upcast", True)):
        return torch.float32
    return torch.float16


def read_card(path: str | Path) -> ModelCard:
    """The card that `load_model` would give a checkpoint, from its configs and the headers of its weights alone.

    Weights are compared with the configs as when they are loaded. Raises `ModelError` as `load_model` does.
    """
    directory = _directory(path, prefer_fp16=False)
    classes = _components(directory)
    scheduler_config = read_json(directory / "scheduler" / "scheduler_config.json")
    reader = _Reader(directory, torch.device("meta"), prefer_fp16=False)
    unet_config, vae_config = reader.config("unet"), reader.config("vae")
    unet = reader.network("unet", lambda: UNet(unet_config), torch.float32)
    vae = reader.network("vae", lambda: VAE(vae_config), torch.float32, _modern_name)
    text = _text_encoders(reader, classes, torch.float32)
    with _blaming(directory):
        _check_that_parts_fit(unet, vae, text)
    return _card(directory, str(path), unet, vae, text, scheduler_config, content_hash(reader.files))


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Put a path in front of a `ModelError` that does not know it."""
    try:
        yield
    except ModelError as error:
        if str(error).startswith(str(path)):
            raise
        raise ModelError(f"{path}: {error}") from error


class _Reader:
    """Builds a checkpoint's parts, and remembers the weight files it read."""

    def __init__(self, directory: Path, device: torch.device, prefer_fp16: bool):
        self.directory, self.device, self.prefer_fp16 = directory, device, prefer_fp16
        self.files: list[Path] = []

    def config(self, component: str) -> dict[str, Any]:
        path = self.directory / component / "config.json"
        config = read_json(path)
        if "auto_map" in config:
            raise ModelError(f"{path}: auto_map asks for code of the repository to be run, which never happens")
        return config

    def network(
        self,
        component: str,
        build: Callable[[], Any],
        dtype: torch.dtype,
        rename: Callable[[str], str] = lambda name: name,
        stem: str = "diffusion_pytorch_model",
        ignored: Callable[[str], bool] = lambda name: False,
    ) -> Any:
        """Build on the meta device, compare, then load."""
        with _blaming(self.directory / component / "config.json"), torch.device("meta"):
            module: nn.Module = build()
        files = weight_files(self.directory / component, stem, prefer_fp16=self.prefer_fp16)
        load_weights(module, files, device=self.device, dtype=dtype, rename=rename, ignored=ignored)
        self.files += files
        return module


def _text_encoders(reader: _Reader, classes: Mapping[str, str], dtype: torch.dtype) -> TextEncoders:
    encoders = [
        _text_encoder(reader, name, tokenizer, classes[name], dtype)
        for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
        if name in classes
    ]
    index = read_json(reader.directory / "model_index.json")
    with _blaming(reader.directory):
        return TextEncoders(encoders, zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", False)))


def _text_encoder(
    reader: _Reader, component: str, tokenizer_name: str, class_name: str, dtype: torch.dtype
) -> TextEncoder:
    tokenizer = load_tokenizer(reader.directory / tokenizer_name)
    config = reader.config(component)
    is_plain = class_name == "CLIPTextModel"

    def build() -> nn.Module:
        return build_text_model(config, class_name)

    with _blaming(reader.directory / component / "config.json"), torch.device("meta"):
        expected = set(build().state_dict())

    def rename(name: str) -> str:
        """Files from different releases of transformers have or lack the prefix of the inner model."""
        candidates = (name, f"text_model.{name}", name.removeprefix("text_model."))
        return next((candidate for candidate in candidates if candidate in expected), name)

    def ignored(name: str) -> bool:
        return name.endswith(".position_ids") or (is_plain and name == "text_projection.weight")

    model = reader.network(component, build, dtype, rename, "model", ignored)
    embeddings = getattr(model, "text_model", model).embeddings
    # The one buffer that is not stored: built on the meta device, it has no values yet.
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1], device=reader.device)[None]
    with _blaming(reader.directory / component):
        return TextEncoder(tokenizer, model)


def _modern_name(name: str) -> str:
    head, _, rest = name.rpartition(".attentions.0.")
    old, _, kind = rest.partition(".")
    return f"{head}.attentions.0.{OLD_ATTENTION_NAMES[old]}.{kind}" if head and old in OLD_ATTENTION_NAMES else name


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {shorten(name)} is unknown, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def _components(directory: Path) -> dict[str, str]:
    """Check model_index.json against the allow-lists. Returns component → class name."""
    index = directory / "model_index.json"
    entries = read_json(index)
    pipeline = entries.get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(f"{index}: pipeline {shorten(pipeline)} is not served, expected one of {', '.join(PIPELINES)}")
    found: dict[str, str] = {}
    for name, entry in entries.items():
        if name.startswith("_") or name in IGNORED_COMPONENTS or not isinstance(entry, list) or entry == [None, None]:
            continue
        if name not in COMPONENTS:
            raise ModelError(f"{index}: component {shorten(name)} is not known to this server")
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ModelError(f"{index}: component {name}: expected [library, class], got {shorten(entry)}")
        accepted = COMPONENTS[name]
        if accepted and tuple(entry) not in accepted:
            classes = ", ".join(sorted({class_name for _, class_name in accepted}))
            raise ModelError(f"{index}: {name} is {shorten('.'.join(entry))}, supported: {classes}")
        found[name] = entry[1]
    required = (*REQUIRED_COMPONENTS, *(("tokenizer_2",) if "text_encoder_2" in found else ()))
    for name in required:
        if name not in found:
            raise ModelError(f"{index}: component {name} is missing")
    return found


def _check_that_parts_fit(unet: UNet, vae: VAE, text: TextEncoders) -> None:
    config, latents = unet.config, vae.config.latent_channels
    if config.in_channels not in (latents, 2 * latents + 1) or config.out_channels != latents:
        raise ModelError(
            f"the UNet takes {config.in_channels} channels and gives {config.out_channels}, the autoencoder's latents "
            f"have {latents}; expected {latents} in, or {2 * latents + 1} of an inpainting network, and {latents} out"
        )
    if vae.config.in_channels != 3 or vae.config.out_channels != 3:
        raise ModelError("the autoencoder's pictures do not have 3 channels")
    if config.text_dim != text.width:
        raise ModelError(f"the UNet reads texts {config.text_dim} wide, the text encoders give {text.width}")
    if config.addition_time_embed_dim is not None:
        given = (text.pooled_width or 0) + 6 * config.addition_time_embed_dim
        if text.pooled_width is None or config.addition_input_dim != given:
            raise ModelError(
                f"the UNet reads {config.addition_input_dim} numbers of pooled text and sizes, this pipeline gives "
                f"{given}"
            )
    elif text.is_sdxl:
        raise ModelError("the pipeline has SDXL's text encoders, but the UNet has no addition_embed_type text_time")


def _card(
    directory: Path,
    source: str,
    unet: UNet,
    vae: VAE,
    text: TextEncoders,
    scheduler_config: Mapping[str, Any],
    weights_hash: str,
) -> ModelCard:
    """Serving defaults: darkroom.json where it speaks, else the family's habits."""
    path, own = directory / "darkroom.json", _own_defaults(directory)
    family = "sdxl" if text.is_sdxl else "sd2" if unet.config.use_linear_projection else "sd1"
    scale = vae.config.scale_factor
    with _blaming(path if own.sampler else directory / "scheduler" / "scheduler_config.json"):
        sampler = own.sampler or default_sampler(scheduler_config)
        if sampler not in SAMPLERS:
            raise ModelError(f"sampler {shorten(sampler)} is unknown, expected one of {', '.join(SAMPLERS)}")
    sigma_schedule = own.sigma_schedule or SIGMA_SCHEDULES[0]
    if sigma_schedule not in supported_sigma_schedules(sampler):
        raise ModelError(f"{path}: sigma_schedule {shorten(sigma_schedule)} does not go with sampler {sampler}")
    is_distilled = sampler == "lcm"
    if unet.config.time_cond_proj_dim is not None:
        guidance = 8.5
    elif is_distilled:
        guidance = 1.0
    else:
        guidance = 5.0 if family == "sdxl" else 7.5
    size_multiple = max(8, scale)
    width, height = _own_size(own, unet.config, vae.config, is_sdxl=text.is_sdxl)
    steps = own.num_inference_steps or (4 if is_distilled else 25)
    if width % size_multiple or height % size_multiple or min(width, height, steps) < 1:
        raise ModelError(
            f"{path if path.is_file() else directory / 'unet' / 'config.json'}: {width}×{height} px at {steps} steps "
            f"cannot be a default; sides are positive multiples of {size_multiple}"
        )
    largest = max(width, height, min(MAX_SIDE_PX, 4 * max(width, height)))
    return ModelCard(
        id=own.id or (directory.name if Path(source).is_dir() else source.partition("@")[0]),
        family=family,
        weights_hash=weights_hash,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance if own.guidance_scale is None else own.guidance_scale,
        sampler=sampler,
        sigma_schedule=sigma_schedule,
        samplers=list(SAMPLERS),
        sigma_schedules=list(SIGMA_SCHEDULES),
        size_multiple=size_multiple,
        vae_scale_factor=scale,
        latent_channels=vae.config.latent_channels,
        needs_mask=unet.config.in_channels > vae.config.latent_channels,
        max_width=largest,
        max_height=largest,
        max_clip_skip=text.max_clip_skip,
        description=own.description,
        license=own.license,
        example_prompts=own.example_prompts,
    )


def _own_defaults(directory: Path) -> ServingDefaults:
    path = directory / "darkroom.json"
    try:
        return msgspec.convert(read_json(path), ServingDefaults) if path.is_file() else ServingDefaults()
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {error}") from error


def _own_size(own: ServingDefaults, unet: UNetConfig, vae: VAEConfig, *, is_sdxl: bool) -> tuple[int, int]:
    """Width and height in pixels of a request that names none."""
    scale = vae.scale_factor
    side = (unet.sample_size or (1024 if is_sdxl else 512) // scale) * scale
    return own.width or side, own.height or side


def _directory(path: str | Path, *, prefer_fp16: bool) -> Path:
    """Find the checkpoint: a directory as it is, else a snapshot of a hub repository at one commit."""
    directory = Path(path)
    if directory.is_dir():
        # A bare "." must have a name to be served under.
        return directory.resolve()
    if directory.exists():
        raise ModelError(
            f"{path}: expected a directory in diffusers' layout; single-file checkpoints are not served, convert them"
        )
    if not HUB_ID.fullmatch(str(path)):
        raise ModelError(f"{path}: no such directory, and not a hub id of the form org/name or org/name@revision")
    repo, _, revision = str(path).partition("@")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{path}: no such directory, and huggingface_hub, which fetches hub ids, is not there"
        ) from error
    try:
        info = HfApi().model_info(repo, revision=revision or None)
        wanted = files_to_fetch([entry.rfilename for entry in info.siblings or ()], prefer_fp16=prefer_fp16)
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=wanted))
    except Exception as error:
        # Network, authentication and missing repositories arrive as many unrelated classes.
        raise ModelError(f"{path}: no such directory, and the hub cannot give it: {shorten(error, 200)}") from error


def files_to_fetch(names: Sequence[str], *, prefer_fp16: bool) -> list[str]:
    """Choose, from a repository's file names, what serving needs: configs, tokenizers and one variant of the weights.

    Only JSON, text and safetensors files of known components are ever chosen.
    """
    chosen = [name for name in names if name in ("model_index.json", "darkroom.json")]
    for component in COMPONENTS:
        own = [name for name in names if name.startswith(f"{component}/") and name.count("/") == 1]
        chosen += [name for name in own if name.endswith((".json", ".txt"))]
        weights = [name for name in own if name.endswith(".safetensors") and "non_ema" not in name]
        half = [name for name in weights if ".fp16" in name]
        full = [name for name in weights if name not in half]
        chosen += (half or full) if prefer_fp16 else (full or half)
    return chosen
