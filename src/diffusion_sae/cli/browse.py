"""`diffusion-sae browse REPORT`."""

import argparse
import contextlib
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", help="folder of a report, as `diffusion-sae report` or `demo` makes it")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..report.browse import ReportServer

    with ReportServer(args.report, args.port) as server:
        print(f"{server.url}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        return {"url": server.url}


def show(result: dict[str, Any]) -> str:
    return f"served {result['url']}"
