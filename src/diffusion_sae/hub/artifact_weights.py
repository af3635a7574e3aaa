"""The weights of an artifact held against its config before anything of either's size is made.

transformers builds what config.json describes and then reads the files; for a config with huge sizes, an index that
leads elsewhere or a header with a million tensors that is too late.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._config import check
from .safe_files import FLOATS, TensorInfo, shards_of, tensor_table

if TYPE_CHECKING:
    from .artifact import ArtifactModel

Find = Callable[[str], str | None]
"""Path of a file of the artifact by its name, None if there is none."""
MAX_SHARDS = 1000
SHOWN = 10
_NOT_OF_THE_CONFIG = ("state_dict", "use_safetensors", "ignore_mismatched_sizes", "device_map", "weights_only")


def require_described_weights(model_class: "type[ArtifactModel]", name: str, find: Find, **kwargs: Any) -> None:
    """Raise ValueError if the weights files are not exactly what the config describes, FileNotFoundError if one is
    missing that the index names.

    Args:
        model_class: what is to be loaded.
        name: of the artifact, for messages.
        find: where its files are.
        **kwargs: arguments of `from_pretrained`, with the source as `source`.
    """
    table = _weights_table(find, kwargs.get("variant"))
    if table is None:
        return  # transformers says which files it looked for
    described = _described(model_class, name, **kwargs)
    refuse_differences(
        name,
        missing=set(described) - set(table),
        unexpected=set(table) - set(described),
        misshapen={
            key: (info.shape, tuple(described[key].shape))
            for key, info in table.items()
            if key in described and info.shape != tuple(described[key].shape)
        },
    )
    for key, info in table.items():
        floating = described[key].is_floating_point()
        check(
            (info.dtype in FLOATS) == floating and (floating or info.dtype[:1] in ("I", "U", "B")),
            f"The weights file of {name!r} has {key} as {info.dtype} where the config asks for "
            f"{', '.join(FLOATS) if floating else 'integers'}. Save or download the artifact again.",
        )


def refuse_differences(
    name: str,
    *,
    missing: set[str],
    unexpected: set[str],
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise ValueError for weights that are not what the config describes; `misshapen`: (found, expected) by tensor."""
    problems = [
        f"{what} {', '.join(sorted(names)[:SHOWN])}{f' and {len(names) - SHOWN:,} more' if len(names) > SHOWN else ''}"
        for what, names in (("lacks", missing), ("has the unexpected", unexpected))
        if names
    ]
    for key, (found, expected) in sorted(misshapen.items())[:SHOWN]:
        problems.append(f"has {key} of shape {found} where the config asks for {expected}")
    check(
        not problems,
        f"The weights file of {name!r} {'; '.join(problems)}. It must hold exactly what its config describes: save or "
        "download the artifact again.",
    )


def _weights_table(find: Find, variant: str | None) -> dict[str, TensorInfo] | None:
    """Of the one file, or of all shards; None if there is neither."""
    part = f".{variant}" if variant else ""
    single = find(f"model{part}.safetensors")
    if single is not None:
        return tensor_table(single)
    index = find(f"model.safetensors.index{part}.json")
    if index is None:
        return None
    places = shards_of(index)
    shards = sorted(set(places.values()))
    check(len(shards) <= MAX_SHARDS, f"The index names {len(shards):,} shards; an artifact has at most {MAX_SHARDS:,}.")
    table: dict[str, TensorInfo] = {}
    for shard in shards:
        path = find(shard)
        if path is None:
            raise FileNotFoundError(f"The index names {shard}, which the artifact lacks. Download it again.")
        found = tensor_table(path)
        announced = {name for name, place in places.items() if place == shard}
        wrong = sorted(set(found) ^ announced)
        check(not wrong, f"{shard} and the index do not agree about {', '.join(wrong[:SHOWN])}. Download it again.")
        table |= found
    return table


def _described(model_class: "type[ArtifactModel]", name: str, *, source: str, **kwargs: Any) -> dict[str, Tensor]:
    """Names, shapes and types of the tensors that the config asks for, none of which is made."""
    config = kwargs.pop("config", None)
    if config is None or isinstance(config, str):
        kept = {key: value for key, value in kwargs.items() if key not in _NOT_OF_THE_CONFIG}
        config_class: Any = model_class.config_class
        config, _ = config_class.from_pretrained(config or source, return_unused_kwargs=True, **kept)
    try:
        with torch.device("meta"):
            return model_class(config).state_dict()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(
            f"The config of {name!r} asks for a tensor with more numbers than there can be ({error}). It is damaged."
        ) from error
