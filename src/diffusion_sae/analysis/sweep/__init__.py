"""Probes over models × layers × timesteps × prompts × heads × seeds: what is fitted, what it costs, what is best."""

from .config import SweepConfig
from .run import Sweep

__all__ = ["Sweep", "SweepConfig"]
