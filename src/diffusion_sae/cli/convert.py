"""`diffusion-sae convert SRC DST`."""

import argparse
from typing import Any

from .options import FOREIGN, add_options, given

OURS = "diffusion_sae"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="SAE of another library or of this one: folder, file, embedded name or Hub id")
    parser.add_argument("destination", help="folder to write to")
    parser.add_argument(
        "--to", choices=(OURS, "sae_lens", "sparsify"), default=OURS, help=f"library to write for (default: {OURS})"
    )
    parser.add_argument("--timestep", type=int, help="for another library, of an SAE over several timesteps: which")
    parser.add_argument("--token", help="Hub token (default: that of `hf auth login`)")
    add_options(parser, "source", *FOREIGN)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.to == OURS and args.timestep is not None:
        raise ValueError("--timestep belongs to --to sae_lens or sparsify: here an SAE keeps all of its timesteps.")
    sae = _load(args)
    if args.to == OURS:
        sae.save_pretrained(args.destination)
    else:
        sae.save_foreign(args.destination, args.to, timestep=args.timestep)
    shape = {name: getattr(sae.config, name) for name in ("d_in", "num_latents", "k", "activation", "input_norm")}
    return {"sae": args.destination, "format": args.to, "converted_from": sae.config.converted_from, **shape}


def _load(args: argparse.Namespace) -> Any:
    from .. import KSparseAutoencoder
    from ..hub.conversion import ForeignOptions, format_at

    options, hub = given(args, *FOREIGN), {} if args.token is None else {"token": args.token}
    if format_at(args.source, ForeignOptions.from_dict(options), **hub) != OURS:
        return KSparseAutoencoder.from_foreign(args.source, **options, **hub)
    wrong = sorted(set(options) - {"subfolder", "revision"})
    if wrong:
        raise ValueError(f"{args.source!r} is an SAE of this library, which leaves out {', '.join(wrong)}.")
    return KSparseAutoencoder.from_pretrained(args.source, **options, **hub)


def show(result: dict[str, Any]) -> str:
    origin = result["converted_from"] or f"an SAE of {OURS}"
    return (
        f"{origin} → {result['format']} in {result['sae']}: {result['num_latents']:,} latents over {result['d_in']} "
        f"dimensions, {result['activation']}, k = {result['k']}"
    )
