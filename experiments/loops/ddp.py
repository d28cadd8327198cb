"""DistributedDataParallel: every process says whose gradient it computes, the first one writes. torchrun --nproc-per-node 2 ddp.py PATH"""

import sys

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import explaind

dist.init_process_group("gloo")
x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
data = explaind.indexed(TensorDataset(x, (x[:, 0] > 0).long()))
net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
model = torch.nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
with explaind.record(optimizer, model, sys.argv[1]) as recorder:
    for ids, *batch in DataLoader(data, batch_size=8, sampler=DistributedSampler(data)):
        recorder.examples(ids)
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
if dist.get_rank() == 0:
    losses = lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none")  # noqa: E731
    run, queries = explaind.open(sys.argv[1]), data.dataset[:4]
    print(explaind.decompose(run, net, data=data.dataset, losses=losses, queries=queries, measure=losses).verify().ok)
dist.barrier()  # gloo at times aborts a process that leaves before the others
dist.destroy_process_group()
