"""The state that an interrupted fit goes on from, read by nobody before it has been found to be one of that fit.

It is a zip archive of torch's. Its checksums tell a damaged one, which torch does not look at; its content is
loaded without executing any of it, and compared with the network and the optimizer that are to take it up.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from nano_think.errors import UserError, brief

PARTS = ("epoch", "global_step", "state_dict", "loops", "optimizer_states", "lr_schedulers", "callbacks")
SELECTION = ("best", "best_step", "waited", "weights", "history")
DEEPEST = 20


class TakenUp(L.Callback):
    """Knows whether a fit has begun: what fails before that, in one that resumes, is up to its state."""

    begun = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything has been restored."""
        self.begun = True


def cannot_go_on(path: str | Path, error: BaseException) -> UserError:
    """What to do about a state that cannot be taken up."""
    return UserError(
        f"{path} is no state that this fit can go on from ({brief(error)}): delete it, and the same command "
        "begins the fit anew"
    )


def check_state(path: str | Path, task: Any) -> None:
    """Raise UserError unless the file holds the state of a fit of `task`, undamaged.

    task: the LightningModule, with a `network` and a `make_optimizer`.
    """
    path = Path(path)
    if path.is_dir():
        return  # of several processes, in the format of torch.distributed, which reads it against the network
    try:
        _check_sums(path)
        state = _loaded(path)
        _check_sizes(state, path.stat().st_size)
        _check_parts(state)
        _same_tensors(state["state_dict"], task.state_dict())
        _check_optimizer(state["optimizer_states"], task.make_optimizer(task.network))
        for saved in state["callbacks"].values():
            if isinstance(saved, dict) and set(saved) == set(SELECTION):
                _check_selection(saved, task.network)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise cannot_go_on(path, error) from error


def _check_sums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("it is packed")
            damaged = archive.testzip()
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile raises struct's, zlib's and its own errors, and a few plain ones
        raise ValueError("it is cut short, or no state") from error
    if damaged is not None:
        raise ValueError(f"{damaged!a} in it is damaged")


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # of an unpickler that is fed anything
        raise ValueError(f"it holds something else than a state, {type(error).__name__}") from error


def _check_sizes(state: Any, num_bytes: int) -> None:
    """A tensor may claim to be larger than the file, by repeating what is there."""
    for leaf in _leaves(state):
        if isinstance(leaf, Tensor) and leaf.numel() * leaf.element_size() > num_bytes:
            raise ValueError(f"a tensor {tuple(leaf.shape)} is larger than the file")


def _leaves(value: Any, depth: int = 0) -> Iterator[Any]:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part, depth + 1)
    else:
        yield value


def _check_parts(state: Any) -> None:
    if not isinstance(state, dict):
        raise ValueError("it holds no state")
    for name in PARTS:
        if name not in state:
            raise ValueError(f"it says nothing of {name}")
    for name in ("epoch", "global_step"):
        if not _is_count(state[name]):
            raise ValueError(f"{name} is {state[name]!a:.40}")
    if not isinstance(state["callbacks"], dict) or not isinstance(state["lr_schedulers"], list):
        raise ValueError("callbacks or lr_schedulers are none")
    done = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    if not all(_is_count(done[name]) for name in ("ready", "started", "processed", "completed")):
        raise ValueError("its numbers of batches are none")
    if not all(_is_plain(leaf) for leaf in _leaves([state["loops"], state["lr_schedulers"]])):
        raise ValueError("loops or lr_schedulers hold something else than numbers")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf is none, text or a number that counts something."""
    return leaf is None or (
        isinstance(leaf, int | float | str) and not (isinstance(leaf, int) and abs(leaf) >> 62)
    )


def _same_tensors(found: Any, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where names or shapes differ."""
    if not isinstance(found, dict) or set(found) != set(wanted):
        raise ValueError("it belongs to a network with other parts")
    for name, tensor in wanted.items():
        other = found[name]
        if isinstance(tensor, Tensor) and not (
            isinstance(other, Tensor) and (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
        ):
            raise ValueError(f"it belongs to a network of other sizes, see {name}")


def _check_optimizer(states: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError, TypeError or LookupError where a state does not fit the optimizer."""
    if not isinstance(states, list) or len(states) != 1:
        raise ValueError("it holds no optimizer, or several")
    wanted = optimizer.state_dict()["param_groups"]
    groups = states[0]["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in wanted]:
        raise ValueError("its optimizer groups parameters otherwise")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, of_one in states[0]["state"].items():
        shape = parameters[index].shape
        for name, value in of_one.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != shape:
                raise ValueError(f"{name!a:.40} of its optimizer has the shape of another parameter")


def _check_selection(saved: dict[str, Any], network: nn.Module) -> None:
    """Raise ValueError or TypeError where the best weights so far are not those of `network`."""
    if not isinstance(saved["best"], float) or not all(
        type(saved[name]) is int for name in ("best_step", "waited")
    ):
        raise ValueError("its best validation is none")
    for step, loss in saved["history"]:
        if not _is_count(step) or not isinstance(loss, float):
            raise ValueError("its history is none")
    if saved["weights"]:
        _same_tensors(saved["weights"], network.state_dict())
