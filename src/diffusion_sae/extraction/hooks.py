"""Reading a denoiser's activations with torch hooks, and stopping its forward once all are read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _ForwardStopped(Exception):  # noqa: N818  control flow, never seen outside this module
    """All wanted layers have been read."""


def activation_of(output: Any) -> Tensor:
    """The hidden states in what a block returned: down blocks and attention blocks return tuples or outputs."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def run_until_captured(
    denoiser: nn.Module, module_paths: Mapping[str, str], forward: Callable[[], object]
) -> dict[str, Tensor]:
    """Call `forward` and return {layer: activations}; nothing after the last wanted layer is computed."""
    captured: dict[str, Tensor] = {}

    def make_hook(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            activations = activation_of(output)
            if activations.ndim not in (3, 4):
                raise ValueError(
                    f"Layer {layer} puts out the shape {tuple(activations.shape)}. Features come from layers that put "
                    "out (B, C, h, w) or (B, T, C); choose such a one, for instance of available_layers()."
                )
            captured.setdefault(layer, activations)
            if len(captured) == len(module_paths):
                raise _ForwardStopped

        return hook

    handles = [denoiser.get_submodule(p).register_forward_hook(make_hook(name)) for name, p in module_paths.items()]
    try:
        forward()
    except _ForwardStopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [f"{name} ({module_paths[name]})" for name in module_paths if name not in captured]
    if missing:
        raise ValueError(
            f"The forward pass of {type(denoiser).__name__} never called {', '.join(missing)}. "
            "Choose a module that it runs, such as one of available_layers()."
        )
    return captured


class _CallCaught(Exception):  # noqa: N818  control flow, never seen outside this module
    """The denoiser was about to be called."""


@contextmanager
def catch_call(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Within the block the first call of `module` is not carried out; its `args` and `kwargs` are in the dict."""
    caught: dict[str, Any] = {}

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(args=args, kwargs=kwargs)
        raise _CallCaught

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield caught
    except _CallCaught:
        pass
    finally:
        handle.remove()
