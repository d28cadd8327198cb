"""The kernel at work on its device: nothing comes back to the host inside a step, and the next steps are read meanwhile."""

import threading
import time
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from explaind.kernel.contracting import Contraction
from explaind.kernel.sweep import Sweep
from explaind.replay.ahead import ahead
from tests import cases

TO_HOST = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim"}
"""Operations whose result, or its size, the host has to wait for."""


class Waits(TorchDispatchMode):
    """Notes every operation that waits for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean_index = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name in TO_HOST or boolean_index:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def waits_of_steps(monkeypatch, device, **asked):
    """What every step of a decomposition waited for, the first one in the sweep left out: there the model is traced."""
    found, step = [], Sweep._step

    def watched(self, *of, **named):
        if torch.device(device).type == "cuda" and found:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode")  # torch says once that it does not see all of them
                torch.cuda.set_sync_debug_mode("error")
        try:
            with Waits() as waits:
                return step(self, *of, **named)
        finally:
            found.append(waits.found)
            if torch.device(device).type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Sweep, "_step", watched)
    if torch.device(device).type == "cpu":  # which looks for idle neurons, since there it waits for nothing
        monkeypatch.setattr(Contraction, "used", lambda self, a: None)
    return found


@pytest.mark.parametrize("products", ["materialise", "ghost", "jvp", "auto"])
@pytest.mark.parametrize("rule", ["secant", "gauss:2"])
def test_a_step_of_a_fixed_rule_returns_nothing_to_the_host(rule, products, device, tmp_path, monkeypatch):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    found = waits_of_steps(monkeypatch, device)
    cases.decomposed(run, rule=rule, products=products, device=device, closure="discrete-gradient")
    assert len(found) == run.steps
    assert found[1:] == [[]] * (run.steps - 1)


def test_a_rule_that_chooses_asks_for_little_more_than_its_choice(tmp_path, monkeypatch):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    found = waits_of_steps(monkeypatch, "cpu")
    cases.decomposed(run, rule="adaptive", tol=1e-6)
    assert all(set(names) <= {"_local_scalar_dense", "item"} for names in found)
    assert 0 < max(map(len, found[1:])) <= 2 * 16  # one number a rung that is tried


def test_what_comes_next_is_read_while_this_is_worked_on():
    began = {key: threading.Event() for key in range(4)}
    threads, seen = set(), []

    def read(key):
        began[key].set()
        threads.add(threading.current_thread())
        return 10 * key

    for found in ahead(read, list(began)):
        seen.append(found)
        if found < 30:
            assert began[found // 10 + 1].wait(timeout=60)
        time.sleep(0.01)
        assert not any(event.is_set() for key, event in began.items() if key > found // 10 + 1)
    assert seen == [0, 10, 20, 30]
    assert threading.main_thread() not in threads


def test_an_error_in_reading_is_raised_in_its_turn():
    def read(key):
        if key == 1:
            raise ValueError("no such key")
        return key

    reading = ahead(read, [0, 1, 2])
    assert next(reading) == 0
    with pytest.raises(ValueError, match="no such key"):
        next(reading)
    assert list(ahead(read, [])) == []
