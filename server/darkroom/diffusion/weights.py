"""Weights from safetensors files, distrusted until checked.

A file's header is read and checked by itself (size, JSON, dtypes, offsets inside the file and without overlap), its
names and shapes are compared with what the config builds, and only then is memory taken for the values. Pickles are
refused by name and never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from darkroom.errors import ModelError, shorten

MAX_HEADER_BYTES = 100 * 1000 * 1000
MAX_JSON_BYTES = 64 << 20
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# Files up to this size are hashed whole; of larger ones the header, the size and HASH_SAMPLES blocks spread evenly.
WHOLE_HASH_BYTES = 256 << 20
HASH_SAMPLES = 256
HASH_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored, under which name, and what its header says of it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ModelError` naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no config is")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def weight_files(directory: Path, stem: str, *, prefer_fp16: bool) -> list[Path]:
    """Find a component's weight files: `<stem>.safetensors` or the shards of its index, plain or fp16.

    Which of the two is taken first follows `prefer_fp16`; the other serves where the first is not there. Raises
    `ModelError` when there are none, or an index leads out of its directory.
    """
    variants = [("", ""), (".fp16", ".fp16")]
    for single, index in reversed(variants) if prefer_fp16 else variants:
        whole = directory / f"{stem}{single}.safetensors"
        if whole.is_file():
            return [whole]
        listing = directory / f"{stem}.safetensors.index{index}.json"
        if listing.is_file():
            return _shards(listing)
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"{directory}: the weights are pickled ({pickles[0]}), which can run code and is never opened; "
            "convert them to safetensors"
        )
    raise ModelError(f"{directory}: {stem}.safetensors is not there")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a weight_map of tensor names to files")
    names = set(weight_map.values()) if all(isinstance(name, str) for name in weight_map.values()) else {None}
    for name in names:
        if name is None or name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {shorten(name)} is not the name of a safetensors file beside it")
    files = [index.parent / name for name in sorted(map(str, names))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: no such file, though {index.name} lists it")
    return files


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file. Raises `ModelError` naming the file and what is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path}: not a whole safetensors file (header of {length} bytes in {size})")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the safetensors header is not valid JSON") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensor, begin, end = _stored_tensor(path, name, entry)
        if end > size - 8 - length:
            raise ModelError(f"{path}: tensor {shorten(name)} ends beyond the end of the file; the file is truncated")
        tensors[name] = tensor
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ModelError(f"{path}: the tensors overlap or leave gaps at byte {position}")
        position = end
    if position != size - 8 - length:
        raise ModelError(f"{path}: {size - 8 - length - position} bytes belong to no tensor")
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48

    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        fits = (
            dtype in DTYPE_BYTES
            and len(shape) <= 8
            and all(is_count(value) for value in (*shape, begin, end))
            and end - begin == math.prod(shape) * DTYPE_BYTES[dtype]
        )
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise ModelError(f"{path}: the header's entry for tensor {shorten(name)} is not valid")
    return StoredTensor(path, name, dtype, tuple(shape)), begin, end


def load_weights(
    module: nn.Module,
    files: Sequence[Path],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[str], str] = lambda name: name,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fill a module that was built on the meta device. With `device` meta the names and shapes are compared, no more.

    `rename` turns a stored name into the module's, `ignored` names what no module wants. Raises `ModelError` naming
    the first tensor that is missing, unexpected or of another shape, before any memory is taken.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if ignored(name):
                continue
            own_name = rename(name)
            if own_name in stored:
                raise ModelError(f"{file}: tensor {shorten(name)} is stored twice")
            stored[own_name] = tensor
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _compare(expected, stored, files)
    if device.type == "meta":
        return

    by_file: dict[Path, list[str]] = {}
    for own_name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append(own_name)
    values = {}
    for file, own_names in by_file.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for own_name in own_names:
                    # A copy, so that nothing hangs on the mapped file once this returns.
                    value = opened.get_tensor(stored[own_name].name)
                    values[own_name] = value.to(device=device, dtype=dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from error
    module.requires_grad_(False)
    module.load_state_dict(values, assign=True)
    module.eval()


def _compare(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], files: Sequence[Path]
) -> None:
    def more(names: Sequence[str]) -> str:
        return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

    unexpected = [name for name in stored if name not in expected]
    missing = [name for name in expected if name not in stored]
    if missing:
        where = files[0] if len(files) == 1 else files[0].parent
        raise ModelError(f"{where}: tensor {missing[0]} is missing{more(missing)}; the config asks for it")
    if unexpected:
        tensor = stored[unexpected[0]]
        raise ModelError(
            f"{tensor.file}: tensor {shorten(tensor.name)} is unexpected{more(unexpected)}; the config has no such part"
        )
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            raise ModelError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, the config asks for "
                f"{list(expected[name])}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise ModelError(f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}, expected floats")


def content_hash(files: Iterable[Path]) -> str:
    """12 hexadecimal characters of a SHA-256 over the weights.

    Files up to 256 MiB count whole; larger ones by size, header and 256 blocks of 64 KiB spread evenly, which tells
    any two trainings apart without reading gigabytes at start-up.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE_HASH_BYTES:
                while block := file.read(1 << 20):
                    digest.update(block)
                continue
            prefix = file.read(8)
            digest.update(struct.pack("<Q", size) + prefix + file.read(struct.unpack("<Q", prefix)[0]))
            for sample in range(HASH_SAMPLES):
                file.seek((size - HASH_SAMPLE_BYTES) * sample // (HASH_SAMPLES - 1))
                digest.update(file.read(HASH_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
