"""Artifacts: saving, strict loading, cards, pushing."""
