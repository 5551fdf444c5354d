"""TensorBoard: event files in <output>/<stage>/tensorboard."""

from __future__ import annotations

from pathlib import Path

from train.trackers.base import TRACKERS, RunInfo, Tracker


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    package = "tensorboard"

    def __init__(self, run: RunInfo):
        from torch.utils.tensorboard import SummaryWriter

        # Later steps, of a process that was killed after its last checkpoint, are not shown.
        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step, flush_secs=30)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self.board.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
        self.board.add_text(name, text, step)

    def close(self) -> None:
        self.board.close()


def _cell(text: str) -> str:
    """Return a text that stays within its cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
