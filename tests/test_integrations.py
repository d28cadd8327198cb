"""Loops that libraries run, or that run on what libraries wrap: the same record as the plain loop on the same batches."""

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler

import explaind
from explaind.errors import RecordError
from explaind.ledger.verify_run import verify_run
from tests import cases
from tests.closeness import algebra, same

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'explaind-ledger[integrations]'")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def loaded(**options):
    return DataLoader(explaind.indexed(cases.DATA), generator=torch.Generator().manual_seed(0), **options)


def made():
    model = cases.PLAIN.model()
    return model, torch.optim.AdamW(model.parameters(), lr=0.03)


def check_same(got, want):
    assert got.steps == want.steps > 3
    same(got.states(0, got.steps + 1), want.states(0, want.steps + 1))
    rows = [run.block(0, run.steps).rows for run in (got, want)]
    assert [row.batch.tolist() for row in rows[0]] == [row.batch.tolist() for row in rows[1]]
    assert [layer.name for layer in got.manifest.layers] == [layer.name for layer in want.manifest.layers]
    ledgers = [cases.decomposed(run) for run in (got, want)]
    for name in ledgers[1].rows:
        same(ledgers[0][name], ledgers[1][name], name)
    assert ledgers[0].verify().ok


def plain(path, loader, accumulate=1, epochs=2):
    model, optimizer = made()
    with explaind.record(optimizer, model, path) as recorder:
        for _ in range(epochs):
            for i, (ids, x, y) in enumerate(loader):
                recorder.examples(ids, np.full(len(ids), 1 / len(ids) / accumulate))
                (cases.losses(model, (x, y)).mean() / accumulate).backward()
                if (i + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
    return explaind.open(path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, loader = accelerator.prepare(*made(), loaded(batch_size=2, shuffle=True))
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for _ in range(2):
            for ids, x, y in loader:
                recorder.examples(ids, np.full(len(ids), 1 / len(ids) / accumulate))
                with accelerator.accumulate(model):
                    accelerator.backward(cases.losses(model, (x, y)).mean())
                    optimizer.step()
                    optimizer.zero_grad()
    check_same(explaind.open(tmp_path / "run"), plain(tmp_path / "plain", loaded(batch_size=2, shuffle=True), accumulate))


def fresh_state():
    """The library has one precision a process, unless it is told to begin anew."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_in_mixed_precision(tmp_path):
    """It puts autocast inside of the model's forward; nobody has to tell."""
    fresh_state()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = cases.PLAIN.model().float()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.03), loaded(batch_size=3))
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for ids, x, y in loader:
            recorder.examples(ids)
            accelerator.backward(cases.losses(model, (x.float(), y)).mean())
            optimizer.step()
            optimizer.zero_grad()
    run = explaind.open(tmp_path / "run")
    assert {row.precision for row in run.block(0, run.steps).rows} == {torch.finfo(torch.bfloat16).eps}
    verdict = verify_run(run, cases.PLAIN.model(), cases.DATA, cases.losses)
    assert verdict.ok, verdict.reasons
    assert verdict.replay_error.max() <= 1e-5
    fresh_state()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "parallel"])
def test_what_is_around_a_model_is_looked_through(wrap, tmp_path):
    model, optimizer = made()
    inside, loader = model, loaded(batch_size=3)
    with explaind.record(optimizer, wrap(model), tmp_path / "run") as recorder:
        for _ in range(2):
            for ids, x, y in loader:
                recorder.examples(ids)
                cases.losses(inside, (x, y)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    check_same(explaind.open(tmp_path / "run"), plain(tmp_path / "plain", loaded(batch_size=3)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_with_workers_and_samplers_of_ones_own(workers, tmp_path):
    def drawn():
        return WeightedRandomSampler(torch.arange(1.0, 9.0), 8, generator=torch.Generator().manual_seed(3))  # with replacement

    got = plain(tmp_path / "run", loaded(batch_sampler=BatchSampler(drawn(), 3, drop_last=False), num_workers=workers))
    sampler = drawn()
    for row, want in zip(got.block(0, got.steps).rows, [*_batches(list(sampler)), *_batches(list(sampler))], strict=True):
        assert row.batch.tolist() == want
    assert cases.decomposed(got).verify().ok


class Labelled(torch.nn.Module):
    """A model as Trainer wants them: by keywords, with its own loss."""

    def __init__(self):
        super().__init__()
        self.inner = cases.PLAIN.model()

    def forward(self, x, labels=None):
        logits = self.inner(x)
        return {"logits": logits} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Counted(Labelled):
    """One that takes the number of items of the whole step."""

    def forward(self, x, labels=None, **kwargs):
        found = super().forward(x, labels)
        if labels is not None and "num_items_in_batch" in kwargs:
            found["loss"] = found["loss"] * len(labels) / kwargs["num_items_in_batch"]
        return found


class Named:
    def __len__(self):
        return len(cases.DATA)

    def __getitem__(self, i):
        return {"x": cases.DATA[i][0], "labels": cases.DATA[i][1]}


def named_losses(model, batch):
    return torch.nn.functional.cross_entropy(model(batch["x"])["logits"], batch["labels"], reduction="none")


def same_ledger(got, model, data, losses, measure, want):
    """As the plain loop's, whose model is the same inside."""
    ledger = explaind.decompose(got, model, data=data, losses=losses, queries=cases.QUERIES, measure=measure, rule="gauss:4")
    assert ledger.verify().ok, ledger.verify().reasons
    plain_ledger = cases.decomposed(want, keep=None)
    for name in plain_ledger.rows:
        algebra(ledger[name], plain_ledger[name], name, float(np.abs(plain_ledger["data"]).max()))


def drawn(run):
    """Ids of all steps, sorted."""
    return sorted(i for row in run.block(0, run.steps).rows for i in row.batch.tolist())


def on_the_same_batches(run, path, **options):
    """The plain loop, with clipping; its parameters are those of the run."""
    inner = cases.PLAIN.model()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.03, **options)
    with explaind.record(optimizer, inner, path) as recorder:
        for row in run.block(0, run.steps).rows:
            optimizer.zero_grad()
            for part in np.unique(row.part):
                ids, weights = row.batch[row.part == part], row.weight[row.part == part]
                recorder.examples(ids, weights)
                x, y = cases.DATA[torch.from_numpy(ids)]
                (cases.losses(inner, (x, y)) @ torch.from_numpy(weights)).backward()
            torch.nn.utils.clip_grad_norm_(inner.parameters(), 0.3)
            optimizer.step()
    plain_run = explaind.open(path)
    algebra(run.states(0, run.steps + 1), plain_run.states(0, run.steps + 1))
    return plain_run


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # of the library's own
@pytest.mark.parametrize("kind", [Labelled, Counted])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_trainer(kind, accumulate, tmp_path):
    from explaind.callbacks.transformers import RecordCallback

    transformers = pytest.importorskip("transformers")
    model = kind()
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
        max_grad_norm=0.3,
        learning_rate=0.03,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, options, train_dataset=explaind.indexed(Named()), callbacks=[RecordCallback(tmp_path / "run", data=Named())]
    )
    trainer.train()
    got = explaind.open(tmp_path / "run")
    assert got.complete
    assert drawn(got) == sorted([*range(8)] * 2)
    want = on_the_same_batches(got, tmp_path / "plain", weight_decay=0.0)
    same_ledger(got, kind(), Named(), named_losses, lambda m, b: cases.measure(m.inner, b), want)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_trainer_that_would_drop_the_ids_is_refused(tmp_path):
    from explaind.callbacks.transformers import RecordCallback

    transformers = pytest.importorskip("transformers")
    options = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(
        Labelled(), options, train_dataset=explaind.indexed(Named()), callbacks=[RecordCallback(tmp_path / "run")]
    )
    with pytest.raises(RecordError, match="remove_unused_columns"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning(accumulate, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    from explaind.callbacks.lightning import RecordCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = cases.PLAIN.model()

        def training_step(self, batch, batch_idx):
            _, x, y = batch
            return cases.losses(self.inner, (x, y)).mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.03)

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.3,
        callbacks=[RecordCallback(tmp_path / "run")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loaded(batch_size=2, shuffle=True))
    got = explaind.open(tmp_path / "run")
    assert got.complete
    assert drawn(got) == sorted([*range(8)] * 2)
    want = on_the_same_batches(got, tmp_path / "plain")
    same_ledger(got, Module(), cases.DATA, lambda m, b: cases.losses(m.inner, b), lambda m, b: cases.measure(m.inner, b), want)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_lightning_that_breaks_keeps_what_was_recorded(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    from explaind.callbacks.lightning import RecordCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = cases.PLAIN.model()

        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ValueError("broken")
            return cases.losses(self.inner, batch[1:]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.03)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[RecordCallback(tmp_path / "run")], **quiet)
    with pytest.raises(ValueError, match="broken"):
        trainer.fit(Module(), loaded(batch_size=2))
    run = explaind.open(tmp_path / "run")
    assert (run.steps, run.complete) == (2, False)


def _batches(ids):
    return [ids[i : i + 3] for i in range(0, len(ids), 3)]


class Sentences:
    """Of numbers; what is to be told is whether the first one comes again."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        words = torch.randint(1, 20, (6,), generator=torch.Generator().manual_seed(i))
        words[3] = words[0] if i % 2 else words[3]
        return {"input_ids": words, "attention_mask": torch.ones(6, dtype=torch.long), "labels": torch.tensor(i % 2)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_real_encoder_with_dropout_in_trainer(tmp_path):
    from explaind.callbacks.transformers import RecordCallback

    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=0.01,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Sentences()
    callback = RecordCallback(tmp_path / "run", data=data)
    transformers.Trainer(model, options, train_dataset=explaind.indexed(data), callbacks=[callback]).train()

    def losses(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    queries = torch.utils.data.default_collate([data[0], data[1]])
    ledger = explaind.decompose(
        explaind.open(tmp_path / "run"),
        transformers.BertForSequenceClassification(config),
        data=data,
        losses=losses,
        queries=queries,
        measure=lambda m, b: -losses(m, b),
    )
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["closure"] <= 1e-9 * verdict.maxima["movement"]
    assert verdict.maxima["arithmetic"] <= 1e-4 * verdict.maxima["movement"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_language_model_counts_tokens_over_the_micro_batches_of_a_step(tmp_path):
    """GPT-2's loss is a sum over tokens, divided by their number in the whole step; checkpoints and evaluations do not matter."""
    from explaind.callbacks.transformers import RecordCallback

    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"
    )
    words = torch.randint(0, 30, (14, 7), generator=torch.Generator().manual_seed(0))
    ignored = torch.arange(14)[:, None] % 3 >= torch.arange(7)  # some begin later: tokens per example differ
    data = [{"input_ids": w, "labels": torch.where(out, -100, w)} for w, out in zip(words, ignored, strict=True)]

    def losses(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:], ignore_index=-100, reduction="none").sum(1)

    torch.manual_seed(0)
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model, callback = transformers.GPT2LMHeadModel(config), RecordCallback(tmp_path / "run")
    transformers.Trainer(model, options, train_dataset=explaind.indexed(data), eval_dataset=data[:4], callbacks=[callback]).train()
    queries = torch.utils.data.default_collate(data[:2])
    run, blank = explaind.open(tmp_path / "run"), transformers.GPT2LMHeadModel(config)
    verdict = explaind.decompose(run, blank, data=data, losses=losses, queries=queries, measure=losses).verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["closure"] <= 1e-9
    assert verdict.maxima["arithmetic_share"] <= 1e-5
