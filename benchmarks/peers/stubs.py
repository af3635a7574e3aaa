"""Stand-ins for modules that a peer imports and that the code in question never calls."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Stub(ModuleType):
    """A module with every name: a class that cannot be made, so that nothing stubbed runs unnoticed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is a stand-in; install {self.__name__} to use it.")

        return type(name, (), {"__init__": refuse})


def stub(*names: str) -> None:
    """Let `import name` find a stand-in from here on. Call it after importing what may look for these modules."""
    for name in names:
        module = _Stub(name)
        module.__spec__ = ModuleSpec(name, loader=None)
        sys.modules.setdefault(name, module)


def import_dictionary_learning() -> None:
    """`dictionary_learning/__init__` imports its buffer of language-model activations, and that nnsight < 0.4."""
    stub("nnsight")


def import_overcomplete() -> None:
    """`overcomplete/__init__` imports its zoo of backbones and its plots, and these timm, torchvision, OpenCV, …"""
    stub("overcomplete.models", "overcomplete.visualization")
