"""Hugging Face's Trainer: a callback, and a training set whose examples hold their ids."""

import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import explaind
from explaind.callbacks.transformers import RecordCallback

words = torch.randint(1, 50, (64, 8), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row[0] % 2} for row in words]
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
path, model = sys.argv[1], BertForSequenceClassification(config)
args = TrainingArguments(path + ".out", num_train_epochs=1, remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no")
Trainer(model, args, train_dataset=explaind.indexed(data), callbacks=[RecordCallback(path)]).train()


def losses(model, batch):
    return cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none")


queries = torch.utils.data.default_collate(data[:4])
print(explaind.decompose(explaind.open(path), model, data=data, losses=losses, queries=queries, measure=losses).verify().ok)
