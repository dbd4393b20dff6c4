"""What a model wrote during its run: continuations of the recipe's prompts, from the run's TensorBoard files.

RUN/tb --read_samples--> prompt -> continuation at a step
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVENTS, TEXTS = "events.out.tfevents.*", "samples/{}/text_summary"


def read_samples(run: Path, step: int, prompts: Sequence[str]) -> dict[str, str]:
    """Each prompt's continuation by the weights of a step; none of what was not written, or cannot be read."""
    wanted = {TEXTS.format(prompt): prompt for prompt in prompts}
    found: dict[str, str] = {}
    if not wanted:
        return found

    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of files that were cut
    for path in sorted((run / "tb").glob(EVENTS)):
        for event in _events(EventFileLoader, path):
            for value in event.summary.value if event.step == step else ():
                if value.tag in wanted and value.tensor.string_val:
                    found[wanted[value.tag]] = value.tensor.string_val[0].decode("utf-8", "replace")
    return {prompt: found[prompt] for prompt in prompts if prompt in found}


def _events(loader: Any, path: Path) -> Any:
    try:
        yield from loader(str(path)).Load()
    except Exception:  # damaged, in one of the many ways of a foreign reader: what came before it counts
        return
