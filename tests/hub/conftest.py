"""A Hub for the tests of this folder, and fresh processes that use it.

The client reads HF_ENDPOINT when it is imported, and another test may have imported it: it never runs in this process.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import HubServer

_SETTINGS = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "XDG_CACHE_HOME")  # of whoever runs the tests: not ours


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="session")
def run_client(
    hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(
        code: str,
        token: str | None = None,
        offline: bool = False,
        cache: Path | None = None,
        check: bool = True,
        args: tuple[object, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run Python `code`, which finds `args` in `sys.argv[1:]`, in a fresh process whose Hub is `hub`.

        Without `token` it is anonymous; without `cache` (its HF_HOME) it starts with an empty one. An exit code other
        than 0 raises with the process's stderr, unless `check` is False.
        """
        env = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
        env |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_HOME": str(cache or tmp_path_factory.mktemp("hf_home")), "HF_HUB_OFFLINE": str(int(offline))}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # many of these processes may run at once
        env |= {"HF_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"The client exited with {done.returncode}:\n{done.stderr}")
        return done

    return run
