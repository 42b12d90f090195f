"""Where a run's log goes besides its folder: programs that draw it while it grows, by --report_to.

To add one, write a class with `log` and `close` and give it a row in TRACKERS. Their packages are optional
and imported only where they are asked for. The run's own log stays what counts: a tracker that fails is
warned about and left out from there on.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from support.errors import UserError, one_line

REQUIREMENTS = "requirements/trackers.txt"


class Tracker(Protocol):
    """Takes the numbers of a step by name, and pictures, each (height, width, 3) uint8."""

    def log(self, step: int, numbers: dict[str, float], pictures: Mapping[str, np.ndarray]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, flags: Mapping, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote after its last checkpoint comes again.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            listed = "\n".join(f"    {name} = {value}" for name, value in flags.items())
            self.writer.add_text("flags", listed)

    def log(self, step: int, numbers: dict[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        for name, pixels in pictures.items():
            self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """Hugging Face's local database of runs: `trackio show`."""

    def __init__(self, folder: Path, flags: Mapping, step: int):
        import trackio

        self.picture = trackio.Image
        config = {
            name: value if isinstance(value, int | float) else str(value) for name, value in flags.items()
        }
        resume = "allow" if step else "never"
        self.run = trackio.init(
            "minbert-multitask", folder.resolve().name, config=config, resume=resume, embed=False
        )

    def log(self, step: int, numbers: dict[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        shown = {name: self.picture(pixels) for name, pixels in pictures.items()}
        self.run.log(numbers | shown, step=step)

    def close(self) -> None:
        self.run.finish()


# The name of a tracker, which is also that of its package.
TRACKERS: dict[str, Callable[[Path, Mapping, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise a UserError if the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: the package {name} is not installed; pip install -r {REQUIREMENTS}"
            )


class Trackers:
    """The trackers of a run.

    Args:
        flags: of the run, to be shown beside its curves.
        step: where the run starts or goes on.
    """

    def __init__(
        self, names: Sequence[str] = (), folder: Path = Path(), flags: Mapping | None = None, step: int = 0
    ):
        self.trackers: dict[str, Tracker] = {}
        for name in names:
            self._try(
                name,
                lambda name=name: self.trackers.update({name: TRACKERS[name](folder, flags or {}, step)}),
            )

    def __bool__(self) -> bool:
        return bool(self.trackers)

    def log(self, line: Mapping, pictures: Mapping[str, np.ndarray] | None = None) -> None:
        """Pass on a line of the run's log."""
        numbers = flatten({name: value for name, value in line.items() if name != "step"})
        for name, tracker in list(self.trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(line["step"], numbers, pictures or {}))

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.close)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 (a full disk, a locked database, another version)
            self.trackers.pop(name, None)
            tqdm.write(f"warning: --report_to {name}: left out from here on ({one_line(error)})")


def flatten(values: Mapping, above: str = "") -> dict[str, float]:
    """The numbers of a line of the log, named as in `layer_conflict/layer.0/sst-para`."""
    numbers = {}
    for name, value in values.items():
        path = above if name == "tasks" else f"{above}/{name}".lstrip("/")  # dev/sst/accuracy
        if isinstance(value, Mapping):
            numbers |= flatten(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[path] = value
    return numbers
