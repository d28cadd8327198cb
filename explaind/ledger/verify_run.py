"""Does a recorded run hold? Its bytes against their checksums, its examples against their fingerprints, its updates against a replay."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from explaind.errors import ReplayError
from explaind.kernel.layout import Layout
from explaind.kernel.rebuild import replay_errors
from explaind.ledger.causes import causes, words_of
from explaind.ledger.decompose import Progress
from explaind.ledger.verify import judged, replay_words
from explaind.ledger.verify_stored import of_losses, of_updates
from explaind.record.device import placed
from explaind.record.watched import model_name
from explaind.replay.batches import Collate, Readable, changed_examples
from explaind.replay.functional import Readout, Training, fitted
from explaind.replay.surroundings import differentiable
from explaind.replay.thin import trajectory
from explaind.store.reader import Run


@dataclass(frozen=True)
class RunVerdict:
    """What was found of a run."""

    ok: bool
    reasons: tuple[str, ...]
    replay_error: np.ndarray
    """How far each rebuilt update is from the recorded one (``Rebuilt.relative_error``): [step, layer]; no rows without a replay."""
    notes: tuple[str, ...] = ()
    """What is no fault: how exactly a thin run was lived again."""

    @staticmethod
    def of_bytes(run: Run) -> "RunVerdict":
        """The stored bytes alone, for a run whose model and data are not at hand; its updates too, where it stores gradients."""
        reasons, errors = run.damage(), np.zeros((0, len(run.manifest.layers)))
        if run.manifest.gradients is not None and run.steps and not reasons:
            errors, words = of_updates(run)
            reasons += words
        return RunVerdict(not reasons, tuple(reasons), errors)


def verify_run(
    run: Run,
    model: nn.Module,
    data: Readable,
    losses: Readout,
    device: str = "cpu",
    progress: Progress | None = None,
    collate: Collate | None = None,
) -> RunVerdict:
    """Check a run against its checksums and replay every step of it in float64.

    model, data, losses, collate as for ``explaind.decompose``. What does not fit is a reason, not an error.
    """
    reasons, words, notes = run.damage(), list[str](), list[str]()
    errors = np.zeros((0, len(run.manifest.layers)))
    try:
        reasons += changed_examples(run, data, run.examples)
        if run.steps:
            errors, words, notes = replay(run, model, data, losses, placed(device), progress, collate)
    except ReplayError as error:
        reasons.append(str(error))
    if words and model_name(model) != run.manifest.model:
        words.append(f"the model given is a {model_name(model)}, the run is of a {run.manifest.model}")
    return RunVerdict(not reasons + words, tuple(reasons + words), errors, tuple(notes))


def replay(
    run: Run,
    model: nn.Module,
    data: Readable,
    losses: Readout,
    device: torch.device,
    progress: Progress | None,
    collate: Collate | None = None,
) -> tuple[np.ndarray, list[str], list[str]]:
    """Replay every step in float64: (relative errors of the rebuilt updates [step, layer], what they say and its likely causes, notes)."""
    layout, done = Layout(run.manifest.layers), iter(range(1, run.steps + 1))
    training = Training(fitted(model, run.manifest.layers, run.constants), losses, device, torch.float64, any(layout.moving))
    steps = trajectory(run, model, losses, data, collate, device, torch.float64)
    tick: Callable[[], None] = (lambda: None) if progress is None else lambda: progress(next(done), run.steps)
    with differentiable():
        errors = replay_errors(steps, layout, training, tick).cpu().numpy()
        lived = steps.lived()
        words = [*lived.doubts, *replay_words(judged(errors, lived.anchored), layout.names, run.rounding)]
        if words:
            words += words_of(causes(steps, errors, layout, training, data))
        else:
            words += of_losses(run, steps, layout, training)
    return errors, words, [lived.note] if lived.note else []
