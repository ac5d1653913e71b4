"""How long two things take, measured side by side.

Calls alternate in the order A B B A A B B A …, so that a machine that warms up, slows down or is
shared disturbs both alike; medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnify import devices
from bnify.borrow import copy_model
from bnify.errors import BnifyError, DeviceError, ExportError
from bnify.quiet import captured_streams
from bnify.structure import Call, Inputs, as_call, named_tensors

#: Rounds of each side before anything counts: caches fill, kernels are chosen.
_WARM_UP: Final = 2
#: Rounds after which more say nothing new.
_MOST: Final = 1000


@dataclass(frozen=True, slots=True)
class Latency:
    """Median seconds of one call, before and after.

    Attributes:
        name: What was run, ``"eager"`` or ``"onnxruntime"``.
        before: Median seconds of the first side.
        after: Median seconds of the second side.
        rounds: Calls of each side that count.
    """

    name: str
    before: float
    after: float
    rounds: int

    @property
    def ratio(self) -> float:
        """``after / before``: below 1 is faster."""
        return self.after / self.before if self.before > 0 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready data."""
        return {**asdict(self), "ratio": self.ratio}


def measure_pair(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    name: str = "",
    seconds: float = 2.0,
    least: int = 5,
) -> Latency:
    """Time two calls in turns, without gradients.

    A call that returns CUDA tensors is timed until their device has finished.

    Args:
        before: The first side.
        after: The second side.
        name: What the figures are called.
        seconds: About how long to measure; warming up comes on top.
        least: Rounds at least, whatever time they take.
    """
    with torch.no_grad():
        busy: set[torch.device] = set()
        for _ in range(_WARM_UP):
            for side in (before, after):
                busy |= {t.device for _, t in named_tensors(side()) if t.device.type == "cuda"}
        spent: tuple[list[float], list[float]] = ([], [])
        started = time.perf_counter()
        for number in range(_MOST):
            if number >= least and time.perf_counter() - started >= seconds:
                break
            turns = ((0, before), (1, after)) if number % 2 == 0 else ((1, after), (0, before))
            for side_number, side in turns:
                spent[side_number].append(_seconds(side, busy))
    return Latency(name, statistics.median(spent[0]), statistics.median(spent[1]), len(spent[0]))


def _seconds(call: Callable[[], Any], busy: set[torch.device]) -> float:
    _wait(busy)
    started = time.perf_counter()
    call()
    _wait(busy)
    return time.perf_counter() - started


def _wait(busy: set[torch.device]) -> None:
    for device in busy:
        torch.cuda.synchronize(device)


# -- models and files ------------------------------------------------------------------------------


def eager_latency(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs,
    *,
    device: str = "cpu",
    seconds: float = 2.0,
    least: int = 5,
) -> Latency:
    """Two models in eval mode on the same inputs; copies run, the models are not touched.

    Args:
        before: The original.
        after: The rewritten model.
        inputs: What forward takes.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        seconds: As for :func:`measure_pair`.
        least: As for :func:`measure_pair`.

    Raises:
        DeviceError: The device is not there.
    """
    where = devices.resolve(device)
    call = as_call(inputs).clone().to(device=where)
    # Not model.to() and model.eval(): people give their own methods these names.
    sides = [nn.Module.to(nn.Module.train(copy_model(m), False), where) for m in (before, after)]
    return measure_pair(
        lambda: call(sides[0]),
        lambda: call(sides[1]),
        name="eager",
        seconds=seconds,
        least=least,
    )


def onnx_latency(
    before: str | Path | bytes,
    after: str | Path | bytes,
    inputs: Inputs,
    *,
    model: nn.Module | None = None,
    device: str = "cpu",
    threads: int = 0,
    seconds: float = 2.0,
    least: int = 5,
) -> Latency:
    """Two ONNX files in onnxruntime, with its own optimisations, on the same inputs.

    Args:
        before: File or serialized model of the original.
        after: The same of the rewritten model; both take the same inputs.
        inputs: What forward takes.
        model: Gives positional inputs the names of its forward's parameters.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        threads: Threads of each session; 0 leaves the choice to onnxruntime, for both.
        seconds: As for :func:`measure_pair`.
        least: As for :func:`measure_pair`.

    Raises:
        ExportError: A file cannot be loaded or run on these inputs.
        DeviceError: onnxruntime has no provider for the device.
    """
    call = as_call(inputs)
    sides = [
        _onnx_call(source, call, model=model, device=device, threads=threads)
        for source in (before, after)
    ]
    return measure_pair(*sides, name="onnxruntime", seconds=seconds, least=least)


def _onnx_call(
    source: str | Path | bytes, call: Call, *, model: nn.Module | None, device: str, threads: int
) -> Callable[[], Any]:
    """Running a session on inputs that lie ready where it wants them."""
    import onnxruntime as ort

    what = "the model" if isinstance(source, bytes) else Path(source).name
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    providers = devices.onnx_providers(device)
    try:
        with captured_streams():
            session = ort.InferenceSession(
                source if isinstance(source, bytes) else str(source), options, providers=providers
            )
        session.disable_fallback()
        _check_provider(session, providers, what)
        feeds = _feeds(session, call, model, what)
        with captured_streams():
            session.run(None, feeds)
    except BnifyError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise ExportError(
            f"{what} cannot be timed in onnxruntime: {str(error).strip().splitlines()[0]}",
            hint="check the file with `bnify verify`",
        ) from error
    return lambda: session.run(None, feeds)


def _check_provider(session: Any, providers: list[Any], what: str) -> None:
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    used = session.get_providers()[0]
    if used != first:
        raise DeviceError(
            f"onnxruntime runs {what} with {used} although {first} was asked for",
            hint="check the driver and CUDA libraries with `bnify doctor`, or use --device cpu",
        )


def _feeds(session: Any, call: Call, model: nn.Module | None, what: str) -> dict[str, Any]:
    """Inputs by the file's names: by name where all of them are known, else in order."""
    given: dict[str, Tensor] = {
        name.replace(".", "_"): tensor for name, tensor in call.tensors(model)
    }
    wanted = [value.name for value in session.get_inputs()]
    if all(name in given for name in wanted):
        return dict(_arrays((name, given[name]) for name in wanted))
    if len(wanted) != len(given):
        raise ExportError(
            f"{what} takes {', '.join(wanted)}, given {', '.join(given)}",
            hint="name the inputs as the file does",
        )
    return dict(_arrays(zip(wanted, given.values(), strict=True)))


def _arrays(named: Any) -> Iterator[tuple[str, Any]]:
    for name, tensor in named:
        if tensor.dtype == torch.bfloat16:
            raise ExportError(
                f"input {name} is bfloat16, which cannot be timed in onnxruntime",
                hint="time the eager model",
            )
        yield name, tensor.detach().cpu().contiguous().numpy()
