"""Metrics of SAEs, their latents, and probes: pure functions, with `evaluate.Metric`s on top (`docs/metrics.md`)."""
