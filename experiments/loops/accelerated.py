"""accelerate: what it prepared is given to the recorder as it is. One process, or several: accelerate launch accelerated.py PATH."""

import sys

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

import explaind

x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
loader = torch.utils.data.DataLoader(explaind.indexed(data), batch_size=16, shuffle=True)
accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2), loader)


def losses(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


with explaind.record(optimizer, model, sys.argv[1]) as recorder:
    for ids, *batch in loader:
        recorder.examples(ids)
        optimizer.zero_grad()
        accelerator.backward(losses(model, batch).mean())
        optimizer.step()
run = explaind.open(sys.argv[1])
print(explaind.decompose(run, net, data=data, losses=losses, queries=data[:4], measure=losses).verify().ok)
