"""Which checkpoint is the best: the one with the lowest loss on the same held-out rows."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_slm.checkpoint import files as checkpoint_files


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a run."""

    val_loss: float | None = None
    """Its held-out loss in nats per token; None if there is no best yet."""
    step: int = -1
    eval_rows: int | None = None
    """Held-out rows of the evaluations that are compared; None in checkpoints of older versions."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Best":
        """The best checkpoint, by a checkpoint's state.json."""
        loss, step = content.get("best_val_loss"), content.get("best_step", -1)
        return cls(loss, step, content.get("best_eval_rows"))

    def fields(self) -> dict[str, Any]:
        """The fields for a checkpoint's state.json."""
        return {"best_val_loss": self.val_loss, "best_step": self.step, "best_eval_rows": self.eval_rows}

    def improved_by(self, step: int, val_loss: float | None) -> "Best":
        """The best after saving a step whose evaluation gave this loss; None: the step was not evaluated."""
        if val_loss is None or (self.val_loss is not None and not val_loss < self.val_loss):
            return self
        return replace(self, val_loss=val_loss, step=step)

    def over(self, eval_rows: int, was_changed: bool) -> tuple["Best", str]:
        """The best of a launch that evaluates `eval_rows` rows; and a note, if the comparison begins again.

        Args:
            eval_rows: this launch's number of held-out rows in an evaluation.
            was_changed: whether any launch changed that number; used for checkpoints that do not record it.
        """
        before = self.eval_rows
        if self.step < 0 or before == eval_rows or (before is None and not was_changed):
            return replace(self, eval_rows=eval_rows), ""
        which = "other held-out rows" if before is None else f"{before:,} held-out rows"
        note = (
            f"the best checkpoint, step {self.step} (loss {self.val_loss:.4f}), was the best over {which}, and "
            f"run.eval_rows is {eval_rows:,} now: losses over other rows do not compare, so the next evaluation "
            "decides anew; it is kept until then"
        )
        return Best(eval_rows=eval_rows), note

    def held(self, held_by_rank: Sequence[Sequence[Sequence[float]]]) -> tuple["Best", str]:
        """The best checkpoint that a host holds; and a note, if it is not the same as before.

        Args:
            held_by_rank: pairs of step and held-out loss that each rank's host holds (`held_best`).
        """
        held = {int(step): loss for theirs in held_by_rank for step, loss in theirs}
        if self.step in held:
            return self, ""
        lost = f"the best checkpoint, step {self.step} (loss {self.val_loss:.4f}), lies on none of these hosts"
        if not held:
            return Best(eval_rows=self.eval_rows), f"{lost}; the next evaluation decides anew"
        step = min(held, key=lambda one: (held[one], one))
        note = f"{lost}; step {step} (loss {held[step]:.4f}) is the best there is"
        return replace(self, val_loss=held[step], step=step), note


def held_best(run: Path, best: Best, until_step: int) -> dict[int, float]:
    """Step -> held-out loss of each checkpoint in a folder that was the run's best when it was saved.

    It covers checkpoints up to `until_step` whose losses are over the same held-out rows.
    """
    held = {}
    for step in checkpoint_files.steps(run):
        checkpoint = checkpoint_files.folder_of_step(run, step)
        if step <= until_step and not checkpoint_files.verify(checkpoint, read=False):
            with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged state
                found = Best.of(checkpoint_files.read_state(checkpoint))
                comparable = found.eval_rows in (None, best.eval_rows)
                if comparable and found.step == step and found.val_loss is not None:
                    held[step] = float(found.val_loss)
    return held
