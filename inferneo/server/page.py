"""The chat page: three files on disk, one self-contained document on the wire."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Page:
    """What `GET /` answers.

    Attributes:
        html: the document, UTF-8; it holds its own style and script and fetches nothing but the API beside it.
        headers: its response headers. The Content-Security-Policy admits that style and that script by their hashes and
            connections to the same origin; nothing else runs, loads, frames the page or is framed by it.
    """

    html: bytes
    headers: dict[str, str]


def load_page() -> Page:
    """Put the page together from page.html, page.css and page.js, which lie beside this module."""
    html, style, script = (_read(f"page.{kind}") for kind in ("html", "css", "js"))
    html = _replace_once(html, '<link rel="stylesheet" href="page.css">', f"<style>{style}</style>")
    html = _replace_once(html, '<script type="module" src="page.js">', f'<script type="module">{script}')
    policy = (
        "default-src 'none'",
        f"style-src '{_csp_hash(style)}'",
        f"script-src '{_csp_hash(script)}'",
        "connect-src 'self'",  # the API and, by CSP level 3, a WebSocket to the same host and port
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text of a model can become markup, not even by our mistake
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return Page(html.encode(), headers)


def _read(name: str) -> str:
    return files("inferneo.server").joinpath(name).read_text(encoding="utf-8")


def _replace_once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"page.html holds {old!r} {text.count(old)} times"
    return text.replace(old, new)


def _csp_hash(source: str) -> str:
    """The hash by which a policy admits an inline element. Source: Content Security Policy Level 3, section 2.3.1."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
