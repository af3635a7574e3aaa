"""Packages that only some functions need, and are installed by an extra."""


def missing(package: str, extra: str, what: str) -> ImportError:
    """The error to raise where the import failed; it says what to install."""
    return ImportError(f"{what} needs {package}, which is not installed: pip install 'diffusion-sae[{extra}]'.")
