"""`diffusion-sae browse`: a report served on this machine alone, with live actions.

The page may ask for the report's own files, of which there is a list from the start, and for a few actions. A request
must name this server as its host, so that no other site can reach it by a name of its own (DNS rebinding), and an
action must carry a token that only the page knows, so that no other page can ask for it.
"""

import json
import logging
import mimetypes
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from .._files import read_json
from .build import MARK, files_of
from .live import LiveSAE, RefusedError

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
LARGEST_IMAGE, LARGEST_TEXT = 32 * 2**20, 2**20
"""Bytes of a request."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ReportServer(ThreadingHTTPServer):
    """Serves one report until it is shut down."""

    daemon_threads = True

    def __init__(self, report: str | Path, port: int = 0) -> None:
        """
        Args:
            report: its folder.
            port: 0 takes a free one.

        Raises:
            FileNotFoundError: if there is no report.
            OSError: if the port is taken.
        """
        folder, files = Path(report), files_of(report)
        self.token = secrets.token_urlsafe(24)
        page = (folder / "index.html").read_text(encoding="utf-8")
        self.page = page.replace(MARK, f'{MARK}\n<meta name="diffusion-sae-browse" content="{self.token}">').encode()
        record = read_json(files / "browse.json")
        self.saes = {key: LiveSAE(key, entry, files, folder) for key, entry in record["saes"].items()}
        served = (p for p in files.rglob("*") if p.suffix in (".js", ".css", ".webp") and p.is_file())
        self.files = {f"/{p.relative_to(folder).as_posix()}": p for p in served}
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    @property
    def _report(self) -> ReportServer:
        return cast(ReportServer, self.server)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def _known_host(self) -> bool:
        names = {f"{name}:{self._report.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not self._known_host():
            self._refuse(HTTPStatus.FORBIDDEN, "This address is not of this server.")
        elif path.startswith("/api/"):
            self._act({"abilities": lambda sae: sae.abilities, "names": lambda sae: sae.names()})
        elif path in ("/", "/index.html"):
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self._report.page)
        elif path in self._report.files:
            kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
            self._send(HTTPStatus.OK, kind, self._report.files[path].read_bytes())
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "The report has no such file.")

    def do_POST(self) -> None:
        if not self._known_host():
            self._refuse(HTTPStatus.FORBIDDEN, "This address is not of this server.")
            return
        self._act(
            {
                "encode": lambda sae: sae.encode(self._body(LARGEST_IMAGE)),
                "names": lambda sae: {"saved": sae.save_names(self._json())},
                "search": lambda sae: sae.search(str(self._json().get("text", ""))),
            }
        )

    def _act(self, actions: dict[str, Any]) -> None:
        """`/api/action/sae`."""
        given = self.headers.get("X-Diffusion-Sae") or ""
        if not secrets.compare_digest(given.encode(), self._report.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "Only the report's own page may ask for this. Load it again.")
            return
        _, _, action, key = [*self.path.split("/", 3), "", ""][:4]
        if action not in actions or key not in self._report.saes:
            self._refuse(HTTPStatus.NOT_FOUND, f"There is no {action!r:.40} of {key!r:.40}.")
            return
        try:
            answer = actions[action](self._report.saes[key])
        except (ValueError, OSError) as error:  # of the input, the SAE's files or its base model
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._send(HTTPStatus.OK, "application/json", json.dumps(answer).encode())

    def _body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > most:
            self.close_connection = True  # what was sent stays unread
            raise RefusedError(f"A request may have {most:,} bytes, this one has {length or 'an unknown number of'}.")
        return self.rfile.read(int(length))

    def _json(self) -> dict[str, Any]:
        try:
            content = json.loads(self._body(LARGEST_TEXT))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RefusedError(f"The request is no JSON: {error}.") from error
        if not isinstance(content, dict):
            raise RefusedError("The request must be a JSON object.")
        return content

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True
        self._send(status, "application/json", json.dumps({"error": message}).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)
