"""One forward pass, recorded: the entry to :mod:`bnify.capture`."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from bnify.borrow import copy_model, fused_attention, in_mode, seeded, sharing_copy
from bnify.capture.captured import Captured
from bnify.capture.passes import (
    detach_updates,
    functionalise,
    shapes_to_constants,
    stop_gradients,
)
from bnify.capture.recorder import BorrowedWriteError, Recorder
from bnify.errors import CaptureError
from bnify.layers import without_synchronisation
from bnify.structure import Call, Inputs, as_call, outputs_of


def record(
    model: nn.Module,
    inputs: Inputs,
    *,
    train: bool = False,
    fake: bool = False,
    seed: int = 0,
    clean: bool = True,
    wide: bool = False,
    borrow: bool = False,
) -> Captured:
    """Record one forward pass of a copy of the model; the model itself is not touched.

    Args:
        model: Any module; its mode does not matter.
        inputs: What forward takes, batch 2 or more (at 1, axes cannot be told apart).
        train: Record train mode, with all of its writes to buffers.
        fake: Propagate shapes only, for models whose activations do not fit into memory.
        seed: Random state of the pass.
        clean: Run the clean-up passes (shape-only readers, functionalisation).
        wide: The model is a float64 copy: record casts to other floating-point types as float64.
        borrow: Run on the parameters themselves instead of copies, where forward does not write to
            them: no time and no memory for copies.

    Raises:
        CaptureError: forward() raised; the message has its last line in the user's code.
    """
    call = as_call(inputs)
    # Below autograd; else plain no_grad, where composites are split.
    attempts = [(True, borrow), (False, borrow)]
    while attempts:
        below, borrowed = attempts.pop(0)
        copied = _fake_copy if fake else sharing_copy if borrowed else copy_model
        working = without_synchronisation(copied(model))
        arguments = _fake_call(call, working) if fake else call.clone()
        gradients = train and below
        recorder = Recorder(
            working,
            arguments.tensors(model),
            original=model,
            wide=wide,
            differentiates=gradients,
            borrowed=borrowed,
        )
        try:
            with (
                _guards(below, gradients, fake_mode=_mode_of(working) if fake else None),
                seeded(seed),
                in_mode(working, train=train),
                recorder.recording(),
            ):
                output = arguments(working)
        except BorrowedWriteError:  # nothing was written: again, on copies
            attempts.insert(0, (below, False))
            continue
        except CaptureError:  # ours: another attempt would end in the same
            raise
        except Exception as error:  # forward() is user code
            if below:
                continue
            raise _failure(model, error) from error
        results = tuple(t.detach() for _, t in outputs_of(output))
        with torch.no_grad():
            recorder.finish(output)
        break
    captured = Captured(
        model=model,
        call=call,
        train=train,
        graph=recorder.graph,
        constants=recorder.constants,
        calls=tuple(recorder.calls),
        aliases={n[0]: tuple(n) for n in recorder.names.values() if len(n) > 1},
        escapes=tuple(recorder.escapes),
        unreplayable=recorder.unreplayable,
        composite=below,
        custom_gradients=recorder.custom_gradients,
        casts=_names_a_float(recorder.graph),
        kept=dict(recorder.kept()),
        outputs=results,
    )
    captured.notes.extend(_unknown(captured))
    captured.notes.extend(
        f"the model keeps {name} of its forward pass: who reads it elsewhere is not seen"
        for name in captured.kept.values()
    )
    if clean:
        shapes_to_constants(captured.graph)
        functionalise(captured.graph)
    if train:
        stop_gradients(captured.graph)
        detach_updates(captured.graph)
    return captured


def _names_a_float(graph: fx.Graph) -> bool:
    return any(
        isinstance(value, torch.dtype) and value.is_floating_point
        for node in graph.nodes
        for value in (*node.args, *node.kwargs.values())
    )


@contextmanager
def _guards(below: bool, gradients: bool, *, fake_mode: Any) -> Iterator[None]:
    """No autocast, no fused attention, no compiled code and no autograd while recording.

    Below autograd nothing is differentiated; ``gradients`` then only leaves the switch on, so
    that the recorder sees where the model turns it off.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(fused_attention(enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            # Our hooks fire for the wrapper too, which has a path of its own.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
        stack.enter_context(torch.set_grad_enabled(gradients))
        if below:
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        stack.enter_context(fake_mode if fake_mode is not None else nullcontext())
        yield


def _failure(model: nn.Module, error: Exception) -> CaptureError:
    """What forward() raised, with the last frame that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)
    ]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else "no message"
    return CaptureError(
        f"{type(model).__name__}.forward raised {type(error).__name__}{where}: {first}",
        hint=_next_step(error),
    )


def _next_step(error: Exception) -> str:
    match error:
        case TypeError():
            return "pass what forward() takes: a tuple of positional inputs, or a dict of keywords"
        case RuntimeError() | ValueError() | IndexError():
            return "check shape and dtype of the inputs (--input 2,3,224,224, or --input-file)"
        case _:
            return "bnify runs the model once in eval mode: see that model.eval()(*inputs) works"


def _unknown(captured: Captured) -> Iterator[str]:
    """What this recording cannot know, said once."""
    kinds = {
        "item": "reads a tensor's value (.item(), int(), format)",
        "branch": "branches on a tensor's value",
        "numpy": "takes a tensor to Python (.numpy() or .tolist())",
    }
    seen = set()
    for escape in captured.escapes:
        if (escape.how, escape.module) not in seen:
            seen.add((escape.how, escape.module))
            where = escape.module or type(captured.model).__name__
            yield f"{where} {kinds[escape.how]}: other inputs may take another path"
    if captured.unreplayable:
        yield captured.unreplayable
    kept = [n for n, tensor in captured.constants.items() if tensor.numel() > 1]
    if kept:
        tensors = "1 tensor that is" if len(kept) == 1 else f"{len(kept)} tensors that are"
        yield f"{tensors} no parameter or buffer: baked in as constants (caches, tables)"


# -- fake tensors --------------------------------------------------------------------------------


def _fake_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    tensors = WeakIdKeyDictionary()
    for _, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if tensor not in tensors:
            faked: torch.Tensor = mode.from_tensor(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                faked = nn.Parameter(faked, requires_grad=tensor.requires_grad)
            tensors[tensor] = faked
            memo[id(tensor)] = faked
    copied = copy_model(model, memo)
    object.__setattr__(copied, "_bnify_fake_mode", mode)
    return copied


def _mode_of(model: nn.Module) -> Any:
    return model._bnify_fake_mode


def _fake_call(call: Call, model: nn.Module) -> Call:
    mode = _mode_of(model)
    return call.map(lambda tensor: mode.from_tensor(tensor.detach()))
