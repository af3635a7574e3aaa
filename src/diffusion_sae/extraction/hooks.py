"""Reading a denoiser's activations with torch hooks, and stopping its forward once all are read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DIFFERENCE = ":diff"  # suffix of a layer's name: what the module adds to its input


class _ForwardStopped(Exception):  # noqa: N818  control flow, never seen outside this module
    """All wanted layers have been read."""


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors at the top of what a module returned: down blocks and attention blocks return tuples or outputs."""
    if isinstance(output, Tensor):
        return [output]
    items = output if isinstance(output, tuple | list) else getattr(output, "to_tuple", tuple)()
    return [item for item in items if isinstance(item, Tensor)]


class ImageStream:
    """Finds the image's hidden states in what a module took or returned.

    U-Net blocks return them first. Blocks of transformers with text beside the image return both, in an order that
    differs between models, or one sequence of both: the image's part is known by its number of tokens.
    """

    def __init__(self, num_tokens: int | None, text_in_sequence: str | None = None) -> None:
        self.num_tokens = num_tokens
        """Image tokens of a transformer; None for a U-Net."""
        self.text_in_sequence = text_in_sequence

    def __call__(self, output: Any, layer: str) -> Tensor:
        holder, part = self.locate(output, layer)
        return holder if part is None else holder[:, part]

    def locate(self, output: Any, layer: str) -> tuple[Tensor, slice | None]:
        """The tensor that holds the image's hidden states, and which of its tokens they are if it also holds text."""
        tensors = tensors_of(output)
        if self.num_tokens is None or not tensors or tensors[0].ndim != 3:
            return self._checked(tensors, layer), None
        fitting = [t for t in tensors if t.ndim == 3 and t.shape[1] == self.num_tokens]
        if len(fitting) > 1:
            raise ValueError(
                f"Layer {layer} puts out {len(fitting)} streams of {self.num_tokens} tokens, so that image and text "
                "cannot be told apart. Choose another image_size."
            )
        return (fitting[0], None) if fitting else (tensors[0], self._cut(tensors[0], layer))

    def _cut(self, sequence: Tensor, layer: str) -> slice:
        """The image's part of a sequence of text and image tokens."""
        tokens = self.num_tokens or 0
        if sequence.shape[1] < tokens:
            raise ValueError(
                f"Layer {layer} works on {sequence.shape[1]} tokens where the image has {tokens}: it does not put out "
                "image tokens. Choose another layer, for instance of available_layers()."
            )
        if self.text_in_sequence is None:
            raise ValueError(
                f"Layer {layer} puts out {sequence.shape[1]} tokens, text and {tokens} of the image, and it is not "
                "known which come first: add the denoiser to FAMILIES in extraction/families.py."
            )
        start = sequence.shape[1] - tokens if self.text_in_sequence == "first" else 0
        return slice(start, start + tokens)

    @staticmethod
    def _checked(tensors: list[Tensor], layer: str) -> Tensor:
        if not tensors or tensors[0].ndim not in (3, 4):
            shape = tuple(tensors[0].shape) if tensors else None
            raise ValueError(
                f"Layer {layer} puts out the shape {shape}. Features come from layers that put "
                "out (B, C, h, w) or (B, T, C); choose such a one, for instance of available_layers()."
            )
        return tensors[0]


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def run_until_captured(
    denoiser: nn.Module,
    module_paths: Mapping[str, str],
    forward: Callable[[], object],
    stream: Callable[[Any, str], Tensor],
) -> dict[str, Tensor]:
    """Call `forward` and return {layer: activations}; nothing after the last wanted layer is computed."""
    captured: dict[str, Tensor] = {}

    def make_hook(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            activations = stream(output, layer)
            if layer.endswith(DIFFERENCE):
                entered = stream(_input_of(args, kwargs), layer)
                if entered.shape != activations.shape:
                    raise ValueError(
                        f"Layer {layer} takes {tuple(entered.shape)} and puts out {tuple(activations.shape)}: a "
                        f"difference needs equal shapes. Leave out {DIFFERENCE!r}, or choose a module within it."
                    )
                activations = activations - entered
            captured.setdefault(layer, activations)
            if len(captured) == len(module_paths):
                raise _ForwardStopped

        return hook

    handles = [
        denoiser.get_submodule(path).register_forward_hook(make_hook(name), with_kwargs=True)
        for name, path in module_paths.items()
    ]
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


def _exchanged(output: Any, old: Tensor, new: Tensor) -> Any:
    """`output` with `new` wherever it holds `old`: a U-Net's down block returns it as a skip connection as well."""
    if output is old:
        return new
    if isinstance(output, dict):
        return type(output)(**{key: _exchanged(value, old, new) for key, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_exchanged(value, old, new) for value in output)
    return output


@contextmanager
def replaced_activations(
    denoiser: nn.Module, layer: str, module_path: str, replace: Callable[[Tensor], Tensor], stream: ImageStream
) -> Iterator[None]:
    """Within the block the layer puts out `replace(activations)` for its activations (B, C, h, w) or (B, T, C).

    Of `…:diff` layers the difference is replaced: the output moves by what the replacement moves. What `replace`
    returns unchanged leaves the forward as it is, bit for bit.

    Raises:
        ValueError: at the end of the block, if no forward came by the layer.
    """
    calls = 0

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        holder, part = stream.locate(output, layer)
        activations = there = holder if part is None else holder[:, part]
        if layer.endswith(DIFFERENCE):
            activations = there - stream(_input_of(args, kwargs), layer)
        new = replace(activations)
        if new.shape != activations.shape:
            raise ValueError(f"Layer {layer} puts out {tuple(activations.shape)}, its replacement {tuple(new.shape)}.")
        if layer.endswith(DIFFERENCE):
            new = there + (new - activations)
        if part is not None:
            new = torch.cat([holder[:, : part.start], new, holder[:, part.stop :]], dim=1)
        return _exchanged(output, holder, new)

    handle = denoiser.get_submodule(module_path).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise ValueError(f"The forward pass of {type(denoiser).__name__} never called {layer} ({module_path}).")


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
