"""The identity of a model by its content."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ._files import fingerprint_of


def weights_hash(networks: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> str:
    """16 hex digits of a SHA-256 over the tensors of every network, by name and content.

    `settings`: what decides the numbers as the weights do, such as the noise schedule and the scale of the latents.
    """
    digest = hashlib.sha256(fingerprint_of(settings).encode())
    for component, network in sorted(networks.items()):
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{component}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
