"""`diffusion-sae push ARTIFACT REPO_ID`."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="folder or embedded name of a trained SAE or probe, or a feature store")
    parser.add_argument(
        "repo_id",
        help="owner/name on the Hub, such as revelio/sd15-up1-t25; owner/ alone: named by its origin",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; made if there is none (default: main)")
    parser.add_argument("--commit-message", default="Upload with diffusion_sae", help="title of the commit")
    parser.add_argument("--token", help="Hub token (default: that of `hf auth login`)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = _load(args.artifact)
    repo_id = args.repo_id + artifact_name(model) if args.repo_id.endswith("/") else args.repo_id
    url = model.push_to_hub(
        repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.commit_message,
        token=args.token,
    )
    return {"repo_id": repo_id, "commit": url}


def artifact_name(model: Any) -> str:
    """`<model>-<layer>-t<timestep>` of the extraction that an SAE or probe was trained on, or that made a store."""
    from ..zoo.names import ArtifactName

    made_from = model.provenance
    if made_from is None:
        raise ValueError("It does not say which extraction it was trained on; give the full owner/name.")
    if len(made_from.layers) * len(made_from.timesteps) > 1:
        raise ValueError(
            f"The features are of the layers {', '.join(made_from.layers)} and the timesteps "
            f"{', '.join(map(str, made_from.timesteps))}, which no name says; give the full owner/name."
        )
    (layer,), (timestep,) = made_from.layers, made_from.timesteps
    return str(ArtifactName(made_from.model.rstrip("/").rsplit("/", 1)[-1].lower(), layer, timestep))


def _load(artifact: str) -> Any:
    from transformers import AutoModel

    from .. import FeatureStore
    from ..features.layout import MANIFEST
    from ..zoo import resolve_source

    if (Path(artifact) / MANIFEST).is_file():
        return FeatureStore(artifact)
    return AutoModel.from_pretrained(resolve_source(artifact))


def show(result: dict[str, Any]) -> str:
    return f"pushed to {result['repo_id']}: {result['commit']}"
