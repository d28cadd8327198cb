"""A rule must say what torch.optim did, and split it without a rest."""

import inspect
from dataclasses import replace

import pytest
import torch

from explaind.errors import RuleError
from explaind.rules import Facts, Filter, Rule, register, rule_named, rule_of
from tests import cases, reference
from tests.closeness import algebra, rounding

SHAPES = ((3, 2), (4,), (2, 2, 2), ())
EXAMPLES = 3


def parameters():
    return [cases.normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]


def shares(step):
    """Gradients of three examples: [example, param]. In step 3 the second tensor has none."""
    return [None if (step, i) == (3, 1) else cases.normal(EXAMPLES, *shape, seed=100 * step + i) for i, shape in enumerate(SHAPES)]


def watched(case, steps=6):
    """The steps of a training on made-up gradients."""
    params = parameters()
    optimizer = case.make(params)
    scheduler = case.schedule(optimizer) if case.schedule else None
    moments = reference.watch(optimizer, params)
    for step in range(steps):
        for p, share in zip(params, shares(step), strict=True):
            p.grad = None if share is None else share.sum(0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return moments


def flat_shares(step):
    """[example, param]"""
    empty = [torch.zeros(EXAMPLES, *shape, dtype=torch.float64) for shape in SHAPES]
    return torch.cat([(e if g is None else g).reshape(EXAMPLES, -1) for e, g in zip(empty, shares(step), strict=True)], dim=1)


@cases.every_optimizer
def test_advancing_the_rule_from_the_state_before_a_step_gives_the_state_after_it(case):
    for step, moment in enumerate(watched(case)):
        after, delta = moment.filter.advance(moment.momentum, flat_shares(step).sum(0), moment.theta)
        algebra(after, moment.momentum_after, f"momentum after step {step}")
        algebra(delta, moment.after - moment.theta, f"Δ of step {step}", scale=float(moment.theta.abs().max()))


@cases.every_optimizer
def test_the_shares_of_examples_decay_and_first_momentum_sum_to_the_update(case):
    moments = watched(case)[2:]  # so that there is a momentum to begin with
    z_examples = torch.zeros(EXAMPLES, len(moments[0].theta), dtype=torch.float64)
    z_decay, z_first = torch.zeros_like(moments[0].theta), moments[0].momentum
    for step, moment in enumerate(moments, start=2):
        f, still = moment.filter, torch.zeros_like(moment.theta)
        parts = []
        for i, share in enumerate(flat_shares(step)):
            z_examples[i], moved = f.advance(z_examples[i], share, still)
            parts.append(moved)
        z_decay, moved = f.advance(z_decay, still, moment.theta)
        z_first, by_first = f.advance(z_first, still, still)
        algebra(sum(parts) + moved + by_first, moment.after - moment.theta, f"step {step}", scale=float(moment.theta.abs().max()))


EVERY = {"lr": (0.03, 0.1, 0.0, 0.02), "weight_decay": (0.1, 0.0, 0.3), "maximize": (False, True), "foreach": (False, True, None)}
BETAS = {"betas": ((0.8, 0.95), (0.0, 0.9), (0.5, 0.7)), "eps": (1e-8, 1e-2)}
DECOUPLED = {"decoupled_weight_decay": (False, True)} if cases.has(torch.optim.Adam, "decoupled_weight_decay") else {}
CHANGED = {
    "SGD": {"momentum": (0.8, 0.0, 0.0, 0.5), "dampening": (0.0, 0.3), "nesterov": (False, False, False, True, True)},
    "Adam": {**BETAS, "amsgrad": (True, False, False), **DECOUPLED},
    "AdamW": {**BETAS, "amsgrad": (True, False, False)},
    "Adadelta": {"rho": (0.8, 0.0, 0.5), "eps": (1e-6, 1e-2)},
    "Adafactor": {"beta2_decay": (-0.8, -0.3), "eps": ((None, 1e-3), (1e-3, 0.1)), "d": (1.0, 0.1)},
    "Adagrad": {"lr_decay": (0.0, 0.2, 0.1), "eps": (1e-10, 1e-2)},
    "Adamax": BETAS,
    "ASGD": {"lambd": (1e-4, 0.2), "alpha": (0.75, 0.5), "t0": (2.0, 1.0)},
    "NAdam": {**BETAS, "momentum_decay": (4e-3, 0.1), "decoupled_weight_decay": (False, True)},
    "RAdam": {**BETAS, "decoupled_weight_decay": (False, True)},
    "RMSprop": {"momentum": (0.8, 0.0, 0.0, 0.5), "centered": (True, False, False), "alpha": (0.8, 0.5), "eps": (1e-8, 1e-2)},
    "Rprop": {"etas": ((0.5, 1.2), (0.3, 1.5)), "step_sizes": ((1e-6, 50.0), (1e-4, 0.02))},
}
if hasattr(torch.optim, "Muon"):
    scales = {"adjust_lr_fn": (None, "original", "match_rms_adamw"), "ns_coefficients": ((3.4445, -4.775, 2.0315), (3.0, -3.2, 1.2))}
    CHANGED["Muon"] = {"momentum": (0.8, 0.0, 0.5), "nesterov": (True, True, False), "ns_steps": (5, 2), "eps": (1e-7, 1e-2), **scales}
"""What may be changed in the middle of a run: torch's state of an option that is off rests, and is taken up where it was left."""


@pytest.mark.parametrize("name", CHANGED)
def test_options_may_be_changed_by_hand(name, monkeypatch):
    if name == "Muon":
        monkeypatch.setattr(f"{__name__}.SHAPES", ((3, 2), (2, 4)))
    kind = getattr(torch.optim, name)
    options = {option: values for option, values in {**EVERY, **CHANGED[name]}.items() if cases.has(kind, option)}
    case = cases.row(name, kind, **{option: values[0] for option, values in options.items()})
    for step, moment in enumerate(watched(replace(case, schedule=lambda optimizer: cases.ByHand(optimizer, options)), steps=9)):
        after, delta = moment.filter.advance(moment.momentum, flat_shares(step).sum(0), moment.theta)
        algebra(after, moment.momentum_after, f"momentum after step {step}")
        algebra(delta + moment.filter.rounding, moment.after - moment.theta, f"Δ of step {step}", scale=float(moment.theta.abs().max()))


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_every_option_of_an_optimizer_is_changed(name):
    """But those by which the same is computed in another way, and the only one that is asked for once, when an optimizer begins."""
    options = set(inspect.signature(getattr(torch.optim, name)).parameters)
    same = {"params", "capturable", "differentiable", "fused", "initial_accumulator_value", "decoupled_weight_decay"}
    assert options - same <= set(EVERY) | set(CHANGED[name])


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam], ids=lambda kind: kind.__name__)
def test_an_optimizer_without_a_rule_is_refused_by_name(kind):
    with pytest.raises(RuleError, match=kind.__name__) as caught:
        rule_of(kind(parameters()))
    assert "\n" not in str(caught.value)
    assert "Adam, AdamW" in str(caught.value)
    assert "gradient" in str(caught.value) or "sparse" in str(caught.value)


class Lookahead(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Renamed(torch.optim.AdamW):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)


class SGD(torch.optim.Optimizer):
    """A stranger with a familiar name."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        return None


@pytest.mark.parametrize("kind", [Lookahead, SGD], ids=["overrides step", "only shares a name"])
def test_another_step_than_the_rule_describes_is_refused(kind):
    with pytest.raises(RuleError, match=kind.__name__):
        rule_of(kind(parameters()))


def test_a_subclass_that_keeps_the_step_is_accepted():
    assert rule_of(Renamed(parameters())) is rule_named("AdamW")


def having(option):
    """The optimizers of torch that are not refused and have an option."""
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]
    return pytest.mark.parametrize("kind", [k for k in kinds if cases.has(k, option)], ids=lambda kind: kind.__name__)


@having("differentiable")
def test_a_differentiable_optimizer_is_refused(kind):
    with pytest.raises(RuleError, match=f"{kind.__name__} with differentiable=True"):
        rule_of(kind(parameters(), differentiable=True))


@having("capturable")
def test_a_capturable_optimizer_is_the_same_filter(kind, monkeypatch):
    """Its code is for accelerators, but runs anywhere once torch is told that it may; it counts its steps in float32."""
    monkeypatch.setattr(inspect.getmodule(inspect.unwrap(kind.step)), "_get_capturable_supported_devices", lambda **_: ["cpu"])
    for step, moment in enumerate(watched(cases.row("capturable", kind, capturable=True, foreach=False))):
        after, delta = moment.filter.advance(moment.momentum, flat_shares(step).sum(0), moment.theta)
        rounding(after, moment.momentum_after, f"momentum after step {step}")
        rounding(delta, moment.after - moment.theta, f"Δ of step {step}")


def test_a_run_of_a_rule_that_is_not_here_is_refused_by_name():
    with pytest.raises(RuleError, match="'Lookahead'"):
        rule_named("Lookahead")


def test_a_rule_may_not_take_the_name_of_another():
    class Impostor(Rule):
        optimizer = SGD
        options = ()

        def filter(self, facts):
            return Filter()

    with pytest.raises(RuleError, match=r"a rule for an optimizer named SGD already.*test_rules.SGD beside torch"):
        register(Impostor())
    assert rule_named("SGD").optimizer is torch.optim.SGD


def test_adam_without_its_second_moment_is_refused():
    rule = rule_named("Adam")
    options = dict(zip(rule.options, rule.read(torch.optim.Adam(parameters()).param_groups[0]), strict=True))
    with pytest.raises(RuleError, match="second moment"):
        rule.filter(Facts(options))
