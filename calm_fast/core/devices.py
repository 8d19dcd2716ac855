"""The device that a `device` argument names."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.core.checks import bad_type, bad_value


def usable_device(where: str, device: Any) -> torch.device:
    """Return the device that argument `device` of `where` names; of None a GPU if there is one, else the CPU.

    Raises TypeError, or ValueError with torch's reason if a tensor cannot be made there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise bad_type(where, "device", "a name such as 'cuda:1' or 'cpu', a torch.device, or None", device)
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as problem:  # the latter where torch is built without CUDA
        reason = str(problem).splitlines()[0]
        raise bad_value(where, "device", "one that torch can use here", f"{str(device)!r}: {reason}") from problem
