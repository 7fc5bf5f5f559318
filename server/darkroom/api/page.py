"""The page at `/`, its files, and the API reference at `/docs`: all from this process, nothing from the network."""

from __future__ import annotations

import hashlib
import json
from html import escape
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.problems import TITLES
from darkroom.errors import HTTP_STATUS

router = APIRouter(include_in_schema=False)

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = {
    path.name: path.read_bytes() for path in (Path(__file__).parent / "static").iterdir() if path.suffix in _TYPES
}
STATIC_PATHS = frozenset(f"/static/{name}" for name in _FILES)


def _file(request: Request, name: str, content: bytes) -> Response:
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {
        "Content-Security-Policy": _POLICY,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": etag,
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[Path(name).suffix], headers=headers)


@router.get("/")
async def index(request: Request) -> Response:
    return _file(request, "index.html", _FILES["index.html"])


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    if name not in _FILES:
        raise HTTPException(404)
    return _file(request, name, _FILES[name])


@router.get("/docs")
async def docs(request: Request) -> Response:
    return _file(request, "docs.html", reference(request.app.openapi()).encode())


def reference(document: dict[str, Any]) -> str:
    """The OpenAPI document as one plain HTML page."""
    info = document["info"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="dark light"><title>Darkroom API</title>'
        '<link rel="icon" href="/static/icon.svg" type="image/svg+xml">'
        '<link rel="stylesheet" href="/static/app.css"></head><body><header class="bar">'
        '<h1><span class="lamp" aria-hidden="true"></span><a href="/">Darkroom</a></h1>'
        f'<p class="health">API {escape(info["version"])}</p>'
        '<nav><a href="/openapi.json">openapi.json</a></nav></header><main class="doc">',
        _paragraph(info["description"]),
    ]
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(method, path, operation)
    parts.append("<h2>Errors</h2><p>Every error is an <code>application/problem+json</code> document.</p>")
    rows = [
        [f'<code id="error-{code}">{code}</code>', str(status), escape(TITLES[code])]
        for code, status in HTTP_STATUS.items()
    ]
    parts.append(_table(["code", "status", "meaning"], rows))
    parts.append("<h2>Schemas</h2>")
    for name, schema in schemas.items():
        parts.append(f'<h3 id="schema-{escape(name)}">{escape(name)}</h3>{_paragraph(schema.get("description", ""))}')
        rows = [
            [f"<code>{escape(field)}</code>", _type(part), _text(part.get("description", ""))]
            for field, part in schema.get("properties", {}).items()
        ]
        if rows:
            parts.append(_table(["field", "type", ""], rows))
    parts.append("</main></body></html>")
    return "".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> list[str]:
    parts = [
        f'<h2><code><span class="method">{method.upper()}</span> {escape(path)}</code></h2>',
        _paragraph(operation.get("summary", "") + "."),
        _paragraph(operation.get("description", "")),
    ]
    rows = [
        [f"<code>{escape(part['name'])}</code>", escape(part["in"]), _text(part.get("description", ""))]
        for part in operation.get("parameters", [])
    ]
    if rows:
        parts.append(_table(["parameter", "in", ""], rows))
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body: {escape(kind)} {_type(body['schema'])}</p>")
        for example in body.get("examples", {}).values():
            parts.append(f"<pre><code>{escape(json.dumps(example['value'], indent=2))}</code></pre>")
    rows = []
    for status, reply in sorted(operation["responses"].items()):
        kinds = ", ".join(
            f"{escape(kind)} {'events' if 'itemSchema' in content else _type(content['schema'])}"
            for kind, content in reply.get("content", {}).items()
        )
        rows.append([status, escape(reply["description"]), kinds])
    parts.append(_table(["status", "when", "body"], rows))
    return parts


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words; named ones are linked."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(json.dumps(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    if "contentEncoding" in schema or schema.get("format") == "binary":
        return "base64" if "contentEncoding" in schema else "bytes"
    return escape(str(schema.get("type", "any")))


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>" if text.strip(". ") else ""


def _text(text: str) -> str:
    """Escaped text; `backticks` become code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
