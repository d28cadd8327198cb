"""Devices by name."""

import torch

from explaind.errors import RequestError


def placed(device: str | torch.device) -> torch.device:
    """A device that is there, or a RequestError."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise RequestError(
            "the device cannot be used", expected=have, got=repr(str(device)), do="choose a device that this machine has"
        ) from error
    return torch.device(device)
