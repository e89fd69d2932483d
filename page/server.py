"""The page on a port: what is served, to whom, and how it ends."""

import os
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common.errors import UsageError, UserError

# No file is served, nor fetched for a visitor: results carry their pictures. The browser is told to ask nobody else.
REFUSED = ("/file=", "/file/", "/proxy=", "/monitoring")
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; "
POLICY += "frame-ancestors 'self'; base-uri 'self'; form-action 'self'"


class Guard:
    """ASGI middleware: no file's route, and a policy under which the page asks this server alone."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if any(part in scope["path"] for part in REFUSED):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"this page serves no files\n"})

        async def guarded(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        return await self.app(scope, receive, guarded)


def check_port(host, port):
    """Raises UserError where nothing can listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: no such address") from error
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); give another --port") from error


def prepare(host):
    """Set what gradio reads when it is imported: no analytics, uploads in a folder that goes with the process, and its look at
    the page that it has started not through a proxy. Returns the folder. Raises UserError without gradio, which takes seconds
    to import: that comes when the checkpoints are there."""
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install -r requirements-extra.txt")
    folder = tempfile.mkdtemp(prefix="sit-app-")
    os.environ |= dict(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, HF_HUB_DISABLE_TELEMETRY="1")
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.1", host)))
    return folder


def start(sources, visits, host, port):
    """Serve the page; returns its address. Raises UserError where it does not come up."""
    from starlette.middleware import Middleware

    from . import layout

    blocks = layout.build(sources, visits)
    settings = layout.launching(
        server_name=f"[{host}]" if ":" in host else host, server_port=port, css_paths=Path(__file__).with_name("page.css")
    )
    settings |= dict(theme=layout.theme(), max_file_size=layout.UPLOAD, run_history=False, enable_monitoring=False)
    try:
        blocks.launch(app_kwargs=dict(middleware=[Middleware(Guard)]), **settings)
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen there ({error})") from error
    return blocks.local_url
