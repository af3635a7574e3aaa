"""`diffusion-sae push ARTIFACT REPO_ID`."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="folder or embedded name of a trained SAE or probe")
    parser.add_argument("repo_id", help="owner/name on the Hub, such as revelio/sd15-up1-t25")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; made if there is none (default: main)")
    parser.add_argument("--commit-message", default="Upload with diffusion_sae", help="title of the commit")
    parser.add_argument("--token", help="Hub token (default: that of `hf auth login`)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModel

    from ..zoo import resolve_source

    model = AutoModel.from_pretrained(resolve_source(args.artifact))
    url = model.push_to_hub(
        args.repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.commit_message,
        token=args.token,
    )
    return {"repo_id": args.repo_id, "commit": url}


def show(result: dict[str, Any]) -> str:
    return f"pushed to {result['repo_id']}: {result['commit']}"
