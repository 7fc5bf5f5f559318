"""Pictures say what they are, signatures can be read back, and refused prompts never reach the queue."""

from __future__ import annotations

import datetime
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from darkroom.config import Settings, load_settings
from darkroom.diffusion.finish import C2paSigner, Finisher
from darkroom.diffusion.images import SOURCE_TYPE, read_parameters
from darkroom.engine.local import generate_images
from darkroom.errors import ConfigError, JobError
from darkroom.jobs import GenerationRequest
from darkroom.queue import JobQueue
from darkroom.worker.main import load_models
from numpy.typing import NDArray
from PIL import Image

from tests.support.engines import request_for
from tests.support.http import in_process
from tests.support.instant_worker import InstantWorker, card
from tests.support.tiny_models import write_tiny_model

FOX = {"prompt": "a red fox in the snow"}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
FORMATS = ("png", "jpeg", "webp")


def request(output_format: str = "png") -> GenerationRequest:
    return GenerationRequest(
        prompt="a red fox",
        model="m",
        width=40,
        height=24,
        num_inference_steps=2,
        guidance_scale=1.0,
        seed=7,
        sampler="ddim",
        sigma_schedule="simple",
        output_format=output_format,
    )


def finish(settings: Settings, output_format: str, pixels: NDArray[np.uint8] = PIXELS) -> bytes:
    return Finisher(settings)(pixels, request(output_format), 0, model_hash="abc")


def source_types(content: bytes) -> list[str | None]:
    """What the XMP packet of a picture says of its source."""
    with Image.open(io.BytesIO(content)) as image:
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if packet is None:
        return []
    document = ElementTree.fromstring(packet)
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    return [element.text for element in document.iter(name)]


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_picture_says_that_a_model_made_it(output_format: str) -> None:
    marked = finish(load_settings(), output_format)
    assert source_types(marked) == [SOURCE_TYPE]
    assert source_types(finish(load_settings(mark_source=False), output_format)) == []
    # What else the file says is still there.
    assert read_parameters(marked)["request"]["seed"] == 7  # type: ignore[index]


# Signatures


class Issuer:
    """A certificate authority of the tests' own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("tests' authority")
        self.certificate = (
            _certificate(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, key: Any, *, days: int = 1) -> dict[str, Path]:
        """Files of a chain and its key, as settings."""
        public = key.public_key()
        certificate = (
            _certificate(_name("tests' signer"), self._name, public, days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        chain = b"".join(one.public_bytes(Encoding.PEM) for one in (certificate, self.certificate))
        return {"c2pa_cert": self._write("chain.pem", chain), "c2pa_key": self.write_key(key)}

    def write_key(self, key: Any, password: bytes | None = None) -> Path:
        hidden = BestAvailableEncryption(password) if password else NoEncryption()
        is_old = isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey))
        form = PrivateFormat.TraditionalOpenSSL if is_old else PrivateFormat.PKCS8
        return self._write("key.pem", key.private_bytes(Encoding.PEM, form, hidden))

    def _write(self, name: str, content: bytes) -> Path:
        path = self._directory / f"{len(list(self._directory.iterdir()))}-{name}"
        path.write_bytes(content)
        return path


def _name(text: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, text), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Darkroom")]
    )


def _certificate(subject: x509.Name, issuer: x509.Name, public_key: Any, days: int = 2) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    names = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        decipher_only=False,
        **dict.fromkeys(names, False),
    )


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_signed_picture_tells_who_made_it_and_that_nobody_changed_it(issuer: Issuer, output_format: str) -> None:
    files = issuer.issue(ec.generate_private_key(ec.SECP256R1()))
    signed = finish(load_settings(**files), output_format)
    found = C2paSigner(*files.values()).read(signed, output_format)
    assert found["validation_state"] == "Valid"
    manifest = found["manifests"][found["active_manifest"]]
    assert manifest["claim_generator_info"][0]["name"] == "Darkroom"
    assert manifest["signature_info"]["common_name"] == "tests' signer"
    (action,) = manifest["assertions"][0]["data"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", SOURCE_TYPE)
    # Signed last: the mark and the parameters are under the signature, and the pixels are as they were.
    assert source_types(signed) == [SOURCE_TYPE]
    assert read_parameters(signed)["request"]["seed"] == 7  # type: ignore[index]
    unsigned = finish(load_settings(), output_format)
    assert Image.open(io.BytesIO(signed)).tobytes() == Image.open(io.BytesIO(unsigned)).tobytes()
    assert len(signed) - len(unsigned) < 6000


def test_a_changed_picture_shows(issuer: Issuer) -> None:
    files = issuer.issue(ec.generate_private_key(ec.SECP256R1()))
    signed = finish(load_settings(**files), "jpeg")
    changed = signed[:-40] + bytes([signed[-40] ^ 1]) + signed[-39:]
    found = C2paSigner(*files.values()).read(changed, "jpeg")
    assert found["validation_state"] == "Invalid"
    assert "assertion.dataHash.mismatch" in {status["code"] for status in found["validation_status"]}


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "P-521", "Ed25519", "RSA"],
)
def test_every_kind_of_key_that_c2pa_knows_signs(issuer: Issuer, key: Any) -> None:
    files = issuer.issue(key)
    found = C2paSigner(*files.values()).read(finish(load_settings(**files), "png"), "png")
    assert found["validation_state"] == "Valid"


def test_a_pair_that_makes_no_valid_signature_stops_the_start(issuer: Issuer, tmp_path: Path) -> None:
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    cert = issuer.issue(key)["c2pa_cert"]
    expired = issuer.issue(key, days=-1)
    for files, reason in (
        ({"c2pa_cert": cert, "c2pa_key": issuer.write_key(other)}, "C2PA_CERT"),
        (expired, "C2PA_CERT"),
        ({"c2pa_cert": cert, "c2pa_key": issuer.write_key(key, b"secret")}, "without a password"),
        ({"c2pa_cert": cert, "c2pa_key": issuer.write_key(dsa.generate_private_key(1024))}, "P-256"),
        ({"c2pa_cert": cert, "c2pa_key": cert}, "private key in PEM"),
        ({"c2pa_cert": cert, "c2pa_key": tmp_path / "nothing"}, "No such file"),
        ({"c2pa_cert": tmp_path / "nothing", "c2pa_key": expired["c2pa_key"]}, "No such file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Finisher(load_settings(**files))
    for alone in ({"c2pa_cert": cert}, {"c2pa_key": cert}):
        with pytest.raises(ConfigError, match="or neither"):
            load_settings(**alone)


# Browsers


async def test_every_reply_tells_browsers_to_do_nothing_else_with_it(settings: Settings, queue: JobQueue) -> None:
    async with InstantWorker(queue).running(), in_process(settings, queue) as client:
        made = (await client.post("/generate", json=FOX)).json()
        url = f"/jobs/{made['job_id']}"
        replies = {
            path: await client.get(path)
            for path in ("/", "/docs", "/openapi.json", "/models", "/health/live", url, f"{url}/images/0",
                         f"{url}/events", "/nowhere", "/static/app.css")
        }  # fmt: skip
        replies["refused"] = await client.post("/generate", json={})
        replies["wrong method"] = await client.put("/generate")
    for path, reply in replies.items():
        headers = reply.headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["content-type"], path
        assert headers["content-security-policy"].startswith("default-src 'none'; "), path
        assert headers["referrer-policy"] == "no-referrer", path
        assert headers["cross-origin-resource-policy"] == "same-origin", path
        assert "access-control-allow-origin" not in headers
        is_asset = path in ("/", "/docs", "/static/app.css", f"{url}/events")
        expected = "no-cache" if is_asset else "no-store"
        assert headers["cache-control"] == ("private, max-age=31536000, immutable" if "images" in path else expected)


async def test_a_page_of_another_site_may_call_only_if_it_is_named(settings: Settings, queue: JobQueue) -> None:
    friend, stranger = "https://friend.example", "https://stranger.example"
    await queue.register("idle", [card()])
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    named = settings.model_copy(update={"cors_origins": f"{friend}, http://localhost:3000", "auth": "keys"})
    async with in_process(named, queue) as client:
        assert (await client.options("/generate", headers={"Origin": stranger, **asks})).status_code == 400
        preflight = await client.options("/generate", headers={"Origin": friend, **asks})
        assert preflight.headers["access-control-allow-origin"] == friend
        refused = await client.get("/models", headers={"Origin": friend})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == friend
        assert refused.headers["cross-origin-resource-policy"] == "cross-origin"


@pytest.mark.parametrize(
    ("origins", "site", "origin", "status"),
    [
        (None, "cross-site", "https://stranger.example", 403),
        (None, "same-site", "http://localhost:3000", 403),
        (None, "same-origin", "http://localhost:8000", 202),
        (None, "none", None, 202),
        (None, None, None, 202),
        ("http://localhost:3000", "same-site", "http://localhost:3000", 202),
        ("http://localhost:3000", "cross-site", "https://stranger.example", 403),
        ("*", "cross-site", "https://stranger.example", 202),
    ],
)
async def test_a_form_of_another_site_makes_no_pictures(
    settings: Settings, queue: JobQueue, origins: str | None, site: str | None, origin: str | None, status: int
) -> None:
    await queue.register("idle", [card()])
    headers = {"Sec-Fetch-Site": site, "Origin": origin}
    async with in_process(settings.model_copy(update={"cors_origins": origins}), queue) as client:
        reply = await client.post(
            "/generate",
            json={**FOX, "mode": "async"},
            headers={name: value for name, value in headers.items() if value is not None},
        )
    assert reply.status_code == status


@pytest.mark.parametrize("origins", ["friend.example", "https://a.example/path", "https://a.example,", "null"])
def test_an_origin_that_no_browser_would_send_is_refused_at_start(origins: str) -> None:
    with pytest.raises(ConfigError, match="DARKROOM_CORS_ORIGINS"):
        load_settings(cors_origins=origins)


# Hooks


def inverted(pixels: NDArray[np.uint8], request: GenerationRequest) -> NDArray[np.uint8]:
    assert request.width == pixels.shape[1]
    return 255 - pixels


def refused(pixels: NDArray[np.uint8], request: GenerationRequest) -> NDArray[np.uint8]:
    raise RuntimeError("the inside of somebody's hook")


def test_a_hook_on_pictures_has_the_last_word_on_their_pixels() -> None:
    settings = load_settings(picture_hook=f"{__name__}:inverted")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(finish(settings, "png")))), 255 - PIXELS)


def test_a_picture_whose_hook_fails_is_not_given_out(tmp_path: Path) -> None:
    settings = load_settings(picture_hook=f"{__name__}:refused", device="cpu", num_threads=1)
    model = load_models(settings, [str(write_tiny_model(tmp_path / "model", "sd1"))]).popitem()[1]
    with pytest.raises(JobError) as failed:
        generate_images(model, request_for(model), settings)
    assert "inside" not in str(failed.value)


@pytest.mark.parametrize("target", ["nowhere:f", "json:nothing", "json", "", ":", "json:__name__"])
def test_a_hook_that_is_not_there_stops_the_start(target: str) -> None:
    with pytest.raises(ConfigError, match="DARKROOM_PICTURE_HOOK"):
        Finisher(load_settings(picture_hook=target))


# Prompts


async def ask(settings: Settings, queue: JobQueue, **fields: Any) -> httpx.Response:
    await queue.register("idle", [card()])
    async with in_process(settings, queue) as client:
        return await client.post("/generate", json={**FOX, "mode": "async", **fields})


def with_rules(settings: Settings, tmp_path: Path, rules: str) -> Settings:
    path = tmp_path / "denylist.txt"
    path.write_text(rules)
    return settings.model_copy(update={"prompt_denylist": path})


RULES = "# birds\nowl\nRed  Kite\n\n/eagles?\\b/\n"


@pytest.mark.parametrize(
    "prompt",
    [
        "an owl",
        "OWL!",
        "(owl:1.3), night",
        "an o\u200bwl",
        "an \uff4f\uff57\uff4c",
        "a red kite",
        "a red, kite",
        "a RED-KITE",
        "twelve Eagles",
    ],
)
async def test_a_prompt_with_a_word_of_the_list_is_refused(
    settings: Settings, queue: JobQueue, tmp_path: Path, prompt: str
) -> None:
    reply = await ask(with_rules(settings, tmp_path, RULES), queue, prompt=prompt)
    assert (reply.status_code, reply.json()["code"]) == (422, "prompt_refused")
    assert reply.json()["detail"] == "prompt: this server does not draw that"
    assert prompt not in reply.text
    assert (await queue.stats()).counters["accepted"] == 0


async def test_brackets_of_a_prompt_with_weights_hide_no_word(
    settings: Settings, queue: JobQueue, tmp_path: Path
) -> None:
    rules = with_rules(settings, tmp_path, RULES)
    for prompt in ("an (o)[w](l:1.3)", r"a \owl", "red BREAK kite"):
        reply = await ask(rules, queue, prompt=prompt, prompt_syntax="weighted")
        assert (reply.status_code, reply.json()["code"]) == (422, "prompt_refused"), prompt


@pytest.mark.parametrize("prompt", ["a bowl of owlish soup", "a red fox and a kite", "a bald eagle2", "birds"])
async def test_a_prompt_with_a_word_like_it_is_not(
    settings: Settings, queue: JobQueue, tmp_path: Path, prompt: str
) -> None:
    settings = with_rules(settings, tmp_path, RULES)
    assert (await ask(settings, queue, prompt=prompt, negative_prompt="an owl")).status_code == 202


def likes_foxes(prompt: str) -> bool:
    return "fox" in prompt


async def test_a_function_of_the_operators_own_decides_too(settings: Settings, queue: JobQueue) -> None:
    settings = settings.model_copy(update={"prompt_hook": f"{__name__}:likes_foxes"})
    assert (await ask(settings, queue)).status_code == 202
    assert (await ask(settings, queue, prompt="a cat")).json()["code"] == "prompt_refused"


@pytest.mark.parametrize(("rules", "reason"), [("fine\n/(/\n", "line 2"), ("!!!\n", "line 1")])
async def test_a_list_that_cannot_be_read_stops_the_start(
    settings: Settings, queue: JobQueue, tmp_path: Path, rules: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        await ask(with_rules(settings, tmp_path, rules), queue)
    with pytest.raises(ConfigError, match="No such file"):
        await ask(settings.model_copy(update={"prompt_denylist": tmp_path / "nothing"}), queue)
