"""The virtual environment of the other SAE libraries: made once, used by benchmarks and by tests of parity.

The peers' requirements conflict with one another and with ours: dictionary-learning wants nnsight < 0.4, overcomplete
wants torchvision and OpenCV. Their code needs little of that, so one environment holds all of them, installed without
following dependencies from `requirements.txt`, which lists what is imported. What is imported and never called is
stubbed (`stubs.py`). PyTorch is the version of `constraints.txt` and so our own: a difference in speed or in numbers is
one of the libraries.

    python benchmarks/peers/environment.py    # makes it, or says where it is
"""

import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CONSTRAINTS = ROOT / "constraints.txt"
FOLDER = ROOT / "runs" / "peers" / "released"


def peer_python() -> Path:
    """The interpreter of the environment, which is made first if it is missing or its requirements have changed.

    Raises:
        subprocess.CalledProcessError: if venv or pip fails.
    """
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{FOLDER}.lock"):  # tests that run side by side want it at once
        return _made_or_found()


def _made_or_found() -> Path:
    stamp = FOLDER / "installed.txt"
    wanted = f"Python {sys.version_info.major}.{sys.version_info.minor}\n" + "".join(
        file.read_text(encoding="utf-8") for file in (REQUIREMENTS, CONSTRAINTS)
    )
    python = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Installing the other libraries in {FOLDER} (a few minutes, 2 GB)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-c", CONSTRAINTS, "-r", REQUIREMENTS]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    stamp.write_text(wanted, encoding="utf-8")  # last: an installation that was cut off is made anew
    return python


if __name__ == "__main__":
    print(peer_python())
