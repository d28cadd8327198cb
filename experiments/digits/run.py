"""Do credits point at the right examples? Handwritten digits, with true labels and with 5 % of the labels flipped.

python experiments/digits/run.py [--seeds 0 1 2] [--out runs/digits-study]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import explaind
from explaind.config import read
from explaind.tasks import Digits, Task, load
from explaind.tasks.training import train

CONFIG = Path(__file__).parents[2] / "configs" / "digits.toml"
TOP = 5


def recorded(out: Path, seed: int, overrides: Sequence[str]) -> tuple[Digits, explaind.Run, nn.Module]:
    """Train and record the digits run with a seed of its own for model, batches, split and flips."""
    seeds = ["--train.seed", str(seed), "--task.split_seed", str(seed), "--task.flip_seed", str(seed)]
    config = read(CONFIG, [*seeds, *overrides])
    task = load(config.task.name, config.task.options)
    assert isinstance(task, Digits)
    model = train(task, config, out, overwrite=True)
    return task, explaind.open(out), model


def credits(run: explaind.Run, task: Task, split: str, measure: str, count: int | None = None) -> explaind.Ledger:
    """The ledger [query, example] of a measure on the first `count` examples of a split."""
    data = task.data(split)
    queries = torch.utils.data.default_collate([data[i] for i in range(count or len(data))])
    return explaind.decompose(
        run,
        task.model(),
        data=task.data("train"),
        losses=task.losses,
        queries=queries,
        measure=task.measures()[measure],
        keep=("query", "example"),
    )


def same_class(out: Path, seed: int, images: int = 100, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """How often the examples of highest credit for a test image's own class are of that class."""
    task, run, _ = recorded(out, seed, overrides)
    ledger = credits(run, task, "val", "target_log_probability", images)
    train_labels, labels = (
        np.array([int(task.data(s)[i][1]) for i in range(n)]) for s, n in (("train", len(task.data("train"))), ("val", images))
    )
    best = np.argsort(-ledger["data"], axis=1)[:, :TOP]
    hits = train_labels[ledger.coords["example"]][best] == labels[:, None]
    return {"seed": seed, "all_five": float(hits.all(1).mean()), "of_the_five": float(hits.mean()), **_closing(ledger)}


def flipped_labels(out: Path, seed: int, share: float = 0.05, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """AUC of finding flipped labels by three credits and by the plain training loss at the end."""
    task, run, model = recorded(out, seed, ["--task.flipped", str(share), *overrides])
    examples = len(task.data("train"))
    flipped = np.isin(np.arange(examples), list(task.true_labels()))
    carried = np.array([int(task.data("train")[i][1]) for i in range(examples)])
    held_out = credits(run, task, "val", "loss")
    on_loss = held_out["data"][:, _places(held_out, examples)]  # [query, example]
    labels = np.array([int(task.data("val")[i][1]) for i in range(len(on_loss))])
    by_label = np.stack([on_loss[labels == label].mean(0) for label in range(len(task.outputs()))])  # [label, example]
    own = credits(run, task, "train", "loss")
    return {
        "seed": seed,
        "raises_mean_held_out_loss": float(roc_auc_score(flipped, on_loss.mean(0))),
        "lowers_held_out_loss_of_its_label": float(roc_auc_score(flipped, -by_label[carried, np.arange(examples)])),
        "lowers_own_loss": float(roc_auc_score(flipped, -own["data"][:, _places(own, examples)].diagonal())),
        "training_loss": float(roc_auc_score(flipped, _losses(task, model))),
        **_closing(held_out),
    }


def _places(ledger: explaind.Ledger, examples: int) -> np.ndarray:
    """Places of the examples 0 … on the ledger's axis; every example must have been trained on."""
    assert np.array_equal(ledger.coords["example"], np.arange(examples))
    return np.arange(examples)


def _losses(task: Task, model: nn.Module) -> np.ndarray:
    data = task.data("train")
    with torch.no_grad():
        losses: Tensor = task.losses(model.eval(), torch.utils.data.default_collate([data[i] for i in range(len(data))]))
    return losses.numpy()


def _closing(ledger: explaind.Ledger) -> dict[str, float]:
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    return {"explained_min": float(verdict.explained.min()), "closure_max": verdict.maxima["closure"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/digits-study"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, list[dict[str, Any]]] = {"same_class": [], "flipped_labels": []}
    for seed in given.seeds:
        for name, study in (("same_class", same_class), ("flipped_labels", flipped_labels)):
            result[name].append(study(given.out / f"{name}-{seed}", seed))
            print(name, json.dumps(result[name][-1]), flush=True)
    (given.out / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
