"""Hyper-parameters of parameter groups as they stand at every step, whoever changed them: read again only where they may have been."""

import copy

import numpy as np
import pytest
import torch

from explaind.record.groups import Groups
from explaind.rules import rule_of


def of(**options):
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], **options)
    rule = rule_of(optimizer)
    return optimizer, rule, Groups([optimizer], [rule], params)


def by_hand(optimizer, rule):
    return [list(rule.read(group)) for group in optimizer.param_groups]


def told(groups):
    groups.look()
    return groups.hyper().tolist()


def changed_in_place(group):
    group["lr"].mul_(0.5)


def a_list_in_place(group):
    group["betas"][0] = 0.25


CHANGES = {
    "number": lambda group: group.update(lr=0.125),
    "flag": lambda group: group.update(maximize=True),
    "tuple": lambda group: group.update(betas=(0.5, 0.75)),
    "tensor": lambda group: group.update(lr=torch.tensor(0.125)),
    "tensor in a tuple": lambda group: group.update(betas=(torch.tensor(0.5), 0.75)),
    "tensor that rounds": lambda group: group.update(lr=torch.tensor(0.001)),
    "number of numpy": lambda group: group.update(lr=np.float32(0.001)),
    "tensor that rounds in a tuple": lambda group: group.update(betas=(torch.tensor(0.9), 0.999)),
    "absent": lambda group: group.pop("decoupled_weight_decay"),
    "more": lambda group: group.update(initial_lr=1.0, weight_decay=0.375),
    "an array": lambda group: group.update(mine=np.ones(3), weight_decay=0.375),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_is_read(change):
    optimizer, rule, groups = of(lr=1.0)
    optimizer.param_groups[1].update(lr=0.001, mine=0.0)
    first = told(groups)
    assert groups.hyper() is groups.hyper()
    change(optimizer.param_groups[1])
    second = told(groups)
    assert (first[0], second) == (second[0], by_hand(optimizer, rule))


def test_tensors_and_lists_may_change_in_place():
    """Also those that take the place of plain options later, and are equal to them at first."""
    optimizer, rule, groups = of(lr=torch.tensor(1.0))
    seen = [told(groups)]
    for group in optimizer.param_groups:
        group.update(lr=torch.tensor(0.5), betas=[0.9, 0.999])
        seen.append(told(groups))
        changed_in_place(group)
        seen.append(told(groups))
        a_list_in_place(group)
        seen.append(told(groups))
        assert seen[-1] == by_hand(optimizer, rule)
    assert len({str(one) for one in seen}) == 6


def test_groups_that_are_exchanged_are_read():
    """``load_state_dict`` puts other groups in the place of those that were there."""
    optimizer, rule, groups = of(lr=1.0)
    told(groups)
    other = copy.deepcopy(optimizer.state_dict())
    other["param_groups"][1]["lr"] = 0.0625
    optimizer.load_state_dict(other)
    assert told(groups) == by_hand(optimizer, rule)
    optimizer.param_groups[1]["lr"] = 2.0
    assert told(groups) == by_hand(optimizer, rule)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 3.0})
    assert (len(told(groups)), len(groups.strangers)) == (2, 1)
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = (
        optimizer.param_groups[1]["params"],
        optimizer.param_groups[0]["params"],
    )
    assert told(groups) == by_hand(optimizer, rule)[1::-1]
