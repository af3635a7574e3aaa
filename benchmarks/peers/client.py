"""The parent's side of `worker.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from contenders import HERE, Shape
from environment import FOLDER, peer_python


class Client:
    """A contender's process: started once, asked in turn with the others, idle between."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.about: dict[str, Any] = {}
        """The answer to the last setup."""
        self.log = FOLDER.parent / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable if name in HERE else peer_python(), Path(__file__).with_name("worker.py"), name]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """
        Raises:
            RuntimeError: if the process ends instead of answering; with the end of what it wrote.
        """
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the process has no pipes")
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"{self.name}: {do} ended with exit code {code} ({self.log}):\n{tail}")
        return json.loads(line)

    def setup(self, shape: Shape, device: str) -> None:
        """Weights and optimizer, and a step that is not counted."""
        self.about = self.ask("setup", shape=list(shape), device=device)
        self.about["first_loss"] = self.ask("step")["loss"]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
