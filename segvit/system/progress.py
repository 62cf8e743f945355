"""The progress bar of every command."""

from typing import Any

from segvit.system.extras import require


def progress_bar(enabled: bool, *columns: Any) -> Any:
    """A rich progress bar on stderr."""
    require("rich", extra="train")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )
