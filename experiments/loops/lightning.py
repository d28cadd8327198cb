"""Lightning: a callback, and a loader whose batches begin with their ids."""

import sys

import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy

import explaind
from explaind.callbacks.lightning import RecordCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))

    def losses(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def training_step(self, batch, index):
        return self.losses(batch[1:]).mean()  # batch[0] holds the ids

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[RecordCallback(sys.argv[1])])
trainer.fit(Classifier(), torch.utils.data.DataLoader(explaind.indexed(data), batch_size=16, shuffle=True))
run, asked = explaind.open(sys.argv[1]), {"losses": Classifier.losses, "measure": Classifier.losses}
print(explaind.decompose(run, Classifier(), data=data, queries=data[:4], **asked).verify().ok)
