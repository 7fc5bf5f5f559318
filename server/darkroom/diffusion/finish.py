"""What happens to every picture on its way out, on the threads that compress it: the operator's hook on its pixels, the
mark of its source, and last, since any later change would break it, a C2PA signature."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darkroom import __version__
from darkroom.config import Settings, load_hook
from darkroom.diffusion.images import SOURCE_TYPE, encode_image
from darkroom.errors import ConfigError
from darkroom.jobs import GenerationRequest

# The signature algorithms of C2PA, by the size of an elliptic curve's key.
_CURVES = {256: "es256", 384: "es384", 521: "es512"}


class Finisher:
    """Turns pixels into the file that a client gets. Safe to use from several threads.

    Raises `ConfigError` for a hook, a certificate or a key that cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_marked = settings.mark_source
        self._hook: Callable[..., NDArray[np.uint8]] | None = None
        if settings.picture_hook is not None:
            self._hook = load_hook("DARKROOM_PICTURE_HOOK", settings.picture_hook)
        self._signer: C2paSigner | None = None
        if settings.c2pa_cert is not None and settings.c2pa_key is not None:
            self._signer = C2paSigner(settings.c2pa_cert, settings.c2pa_key)

    def __call__(self, pixels: NDArray[np.uint8], request: GenerationRequest, index: int, *, model_hash: str) -> bytes:
        """The finished file of image `index`; `pixels` `[H, W, 3]` uint8. Raises what the hook raises."""
        if self._hook is not None:
            pixels = self._hook(pixels, request)
        content = encode_image(
            pixels, request, index, model_hash=model_hash, version=__version__, is_marked=self._is_marked
        )
        return content if self._signer is None else self._signer.sign(content, request.output_format)


class C2paSigner:
    """Signs pictures with the key of a certificate chain, the signer's first, as made by a generative model.

    Raises `ConfigError` where the library is missing or the two do not make a valid signature.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        try:
            import c2pa
        except ImportError as error:
            raise ConfigError("DARKROOM_C2PA_CERT needs c2pa-python: pip install 'darkroom[c2pa]'") from error
        self._c2pa: Any = c2pa
        chain, (algorithm, secret) = _read("DARKROOM_C2PA_CERT", cert), _read_key(key)
        # A thumbnail in the manifest would be as large as the picture.
        self._context = c2pa.Context.from_dict({"version": 1, "builder": {"thumbnail": {"enabled": False}}})
        try:
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, secret, None))
            found = self.read(self.sign(_probe(), "png"), "png")
        except c2pa.C2paError as error:
            raise ConfigError(f"DARKROOM_C2PA_CERT={cert} and its key cannot sign: {error}") from error
        # That nobody here trusts the certificate is no fault of the signature.
        faults = {status["code"] for status in found.get("validation_status", [])} - {"signingCredential.untrusted"}
        if faults:
            raise ConfigError(
                f"DARKROOM_C2PA_CERT={cert} and its key make no valid signature: {', '.join(sorted(faults))}"
            )

    def sign(self, content: bytes, output_format: str) -> bytes:
        """The same picture with a signed manifest in it."""
        manifest = {
            "claim_generator_info": [{"name": "Darkroom", "version": __version__}],
            "assertions": [
                {
                    "label": "c2pa.actions",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}]},
                }
            ],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(json.dumps(manifest), self._context) as builder:
            builder.sign(self._signer, f"image/{output_format}", io.BytesIO(content), signed)
        return signed.getvalue()

    def read(self, content: bytes, output_format: str) -> dict[str, Any]:
        """The manifests of a picture, and what is wrong with them."""
        with self._c2pa.Reader(f"image/{output_format}", io.BytesIO(content), context=self._context) as reader:
            found: dict[str, Any] = json.loads(reader.json())
            return found


def _probe() -> bytes:
    """A picture of one pixel."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    return out.getvalue()


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}={path}: {error.strerror}") from error


def _read_key(path: Path) -> tuple[str, bytes]:
    """A private key's algorithm, and the key as PKCS #8 in PEM, the only form that the library takes."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )

    try:
        key = load_pem_private_key(_read("DARKROOM_C2PA_KEY", path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"DARKROOM_C2PA_KEY={path}: expected a private key in PEM without a password") from error
    if isinstance(key, ec.EllipticCurvePrivateKey):
        algorithm = _CURVES.get(key.curve.key_size)
    elif isinstance(key, rsa.RSAPrivateKey):
        algorithm = "ps256"
    else:
        algorithm = "ed25519" if isinstance(key, ed25519.Ed25519PrivateKey) else None
    if algorithm is None:
        raise ConfigError(f"DARKROOM_C2PA_KEY={path}: C2PA knows keys of P-256, P-384, P-521, Ed25519 and RSA")
    return algorithm, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
