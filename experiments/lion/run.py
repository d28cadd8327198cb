"""Train a small network with an optimizer of one's own, and take its predictions apart.

python experiments/lion/run.py [--steps 60] [--out runs/lion]
"""

import argparse

import torch
from lion import Lion
from torch.nn import functional as F

import explaind
from explaind.tasks.digits import Digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/lion")
    given = parser.parse_args()
    torch.manual_seed(0)
    task = Digits()
    model, data = task.model(), task.data("train")
    optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.1)
    loader = torch.utils.data.DataLoader(explaind.indexed(data), batch_size=64, shuffle=True)
    with explaind.record(optimizer, model, given.out, data=data, overwrite=True) as recorder:
        while recorder.steps < given.steps:
            for ids, x, y in loader:
                recorder.examples(ids)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    ledger = explaind.decompose(
        explaind.open(given.out),
        model,
        data=data,
        losses=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        queries=torch.utils.data.default_collate([task.data("val")[i] for i in range(4)]),
        measure=lambda m, batch: m(batch[0]).log_softmax(-1),
        keep=("query", "output", "layer", "example"),
        rule="secant",
    )
    verdict = ledger.verify()
    print(f"{recorder.steps} steps of Lion: {'ok' if verdict.ok else verdict.reasons}; explained {1 - verdict.maxima['unexplained']:.6f}")
    for name in ("closure", "path_share", "arithmetic_share"):
        print(f"  {name:<18}{verdict.maxima[name]:.2g}")


if __name__ == "__main__":
    main()
