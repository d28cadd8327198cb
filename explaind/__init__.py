"""The training ledger: which examples, at which steps, through which layers made a model predict what it predicts."""

from importlib.metadata import version

from explaind.errors import ExplaindError
from explaind.ledger.decompose import decompose
from explaind.ledger.doctor import Diagnosis, doctor
from explaind.ledger.ledger import Ledger
from explaind.ledger.parts import shards_left
from explaind.ledger.saving import open_ledger
from explaind.record.examples import indexed
from explaind.record.recorder import Recorder, record
from explaind.rules.gradient_filter import GrokfastEMA, GrokfastMA
from explaind.store.reader import Run
from explaind.store.reader import open_run as open

__version__ = version("explaind-ledger")

__all__ = [
    "Diagnosis",
    "ExplaindError",
    "GrokfastEMA",
    "GrokfastMA",
    "Ledger",
    "Recorder",
    "Run",
    "__version__",
    "decompose",
    "doctor",
    "indexed",
    "open",
    "open_ledger",
    "record",
    "shards_left",
]
