"""Ray: tasks of one CPU, on a cluster that runs already or on this machine."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkit.core.errors import MissingExtra, UsageError
from advkit.core.text import first_line
from advkit.evaluation.sweep.engines import ONE_THREAD
from advkit.evaluation.sweep.line import Line, carry_out

_SECONDS = 5.0


@dataclass(frozen=True)
class Ray:
    """Ray 2: one task of one CPU for each line. The sweep's folder has to be one that every node sees.

    address: HOST:PORT or auto, of a cluster that runs already; empty joins the one of RAY_ADDRESS or of this machine,
             and starts one here where there is none
    gpus:    that a task asks for
    """

    address: str = ""
    gpus: float = 0.0

    def run(self, home: Path, lines: Sequence[Line], workers: int) -> Iterator[int]:
        """See `Engine.run`."""
        ray = _package()
        own = not ray.is_initialized()
        if own:
            self._join(ray, workers)
        try:
            # Ray would try a task again by itself, and a line that ends its process would end several.
            task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0)(_begin)
            place, waiting, at_work = os.getcwd(), [line.line for line in lines], dict[Any, int]()
            while waiting or at_work:
                while waiting and len(at_work) < workers:
                    number = waiting.pop(0)
                    at_work[task.remote(str(home.absolute()), number, place)] = number
                done, _ = ray.wait(list(at_work), num_returns=1)
                for each in done:
                    yield at_work.pop(each)
        finally:
            if own:
                ray.shutdown()

    def _join(self, ray: Any, workers: int) -> None:
        settings: dict[str, Any] = {
            "log_to_driver": False,
            "runtime_env": {"env_vars": ONE_THREAD},
            "configure_logging": False,
        }
        address = self.address or os.environ.get("RAY_ADDRESS", "")
        try:
            _knock(address)
            ray.init(address=address or "auto", **settings)
            return
        except Exception as error:  # ray raises its own kinds, and those of grpc and of its name lookup
            if address:
                raise UsageError(
                    f"no Ray cluster answers at {address} ({first_line(error)}): start one with `ray start --head`, or "
                    "take --engine ray, which starts one here"
                ) from None
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **settings)


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would wait for a minute, and end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()


def _begin(home: str, number: int, place: str) -> None:
    """A line, in a process of Ray's."""
    os.environ.update(ONE_THREAD)
    os.chdir(place)
    sys.path += [place] if place not in sys.path else []
    import torch

    torch.set_num_threads(1)
    carry_out(Path(home), number)


def _package() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtra("the engine ray needs a package: pip install 'advkit[ray]'") from None
    return ray
