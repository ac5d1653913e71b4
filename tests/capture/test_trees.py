"""Inputs and outputs of any structure: names, order, repeats, what is no tensor."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from bnify.capture import record
from bnify.errors import CaptureError
from bnify.structure import Call
from replaying import check_replay

X = torch.Generator().manual_seed(9)
Pair = namedtuple("Pair", "left right")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


@dataclass
class Record:
    logits: Tensor
    hidden: list[Tensor]
    note: str = "free"
    loss: Tensor | None = None
    inner: dict = field(default_factory=dict)


class ModelOutput(OrderedDict):
    """As transformers has it: a dict whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def net(forward):
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = type("Custom", (nn.Module,), {"forward": forward})()
            model.fc = nn.Linear(6, 6)
            model.gain = nn.Parameter(torch.randn(6))
            model.register_buffer("ramp", torch.arange(6.0))
        return model

    return make


def nested_outputs(self, x):
    y = self.fc(x)
    return {
        "a": [y, (y + 1, None, 3)],
        "pair": Pair(y * 2, {"deep": y.sum()}),
        "record": Record(y, [y, y - 1], inner={"x": y.mean(0), 7: y.std()}),
        "flag": True,
        "size": y.shape[0],
    }


def none_output(self, x):
    return None, self.fc(x), None


def integer_outputs(self, x):
    return self.fc(x).argmax(1), 5, "text", self.fc(x) > 0


def repeated_output(self, x):
    y = self.fc(x)
    return y, y, [y, y.view(-1)]


def inputs_and_parameters_out(self, x):
    return x, self.fc(x), self.gain, self.ramp, self.fc.weight.t()


def constant_out(self, x):
    return torch.ones(3), self.fc(x), torch.tensor([1.5, 2.5])


def dataclass_out(self, x):
    return Record(self.fc(x), [x * 2])


def model_output(self, x):
    return ModelOutput(last=self.fc(x), states=(x, self.fc(x) + 1))


OUTPUTS = [
    nested_outputs,
    none_output,
    integer_outputs,
    repeated_output,
    inputs_and_parameters_out,
    constant_out,
    dataclass_out,
    model_output,
]


@pytest.mark.parametrize("forward", OUTPUTS, ids=lambda f: f.__name__)
def test_outputs_of_any_structure(forward):
    check_replay(net(forward), draw(4, 6))


@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.parametrize("forward", OUTPUTS, ids=lambda f: f.__name__)
def test_empty_batches(forward):
    check_replay(net(forward), draw(0, 6), gradients=False)


def test_a_model_that_returns_no_tensor_has_an_empty_output():
    captured = record(net(lambda self, x: None)(), draw(4, 6))
    assert captured.replay() == []


# -- inputs ----------------------------------------------------------------------------------------


def positional(self, x, y=None, *, scale=1.0):
    return self.fc(x) * scale + (0 if y is None else y)


def variadic(self, *args, **kwargs):
    return sum(self.fc(a) for a in args) - sum(kwargs.values())


def nested(self, batch, flag=False):
    left, right = batch["pair"]
    return self.fc(left) - right + batch["more"][0] * (2 if flag else 3)


def structured(self, record, pair):
    return self.fc(record.logits) + record.hidden[1] + pair.left * pair.right


def mapping(self, images):
    return sum(self.fc(value) for value in images.values())


def sized(self, x, size):
    return self.fc(x).reshape(size)


def keyword_named(self, **kwargs):
    return self.fc(kwargs["lambda"]) + kwargs["a-b"] + kwargs["a_b"] * kwargs["a.b"]


def torch_named(self, torch_, device, inf, relu, getattr):
    return self.fc(torch_).relu() + device * inf + relu - getattr


INPUTS = {
    "default": (positional, lambda: draw(4, 6)),
    "two": (positional, lambda: (draw(4, 6), draw(4, 6))),
    "keywords": (positional, lambda: {"x": draw(4, 6), "y": draw(6), "scale": 2.5}),
    "both": (positional, lambda: Call((draw(4, 6),), {"y": draw(4, 6), "scale": -1})),
    "variadic": (
        variadic,
        lambda: Call((draw(4, 6), draw(4, 6)), {"z": draw(4, 6), "self_": draw(6)}),
    ),
    "nested": (
        nested,
        lambda: ({"pair": (draw(4, 6), draw(4, 6)), "more": [draw(4, 6)], "text": "x"}, True),
    ),
    "dataclass": (
        structured,
        lambda: (Record(draw(4, 6), [draw(6), draw(6)]), Pair(draw(6), draw(6))),
    ),
    "defaultdict": (mapping, lambda: (defaultdict(list, {"a": draw(4, 6), "b": draw(4, 6)}),)),
    "model output": (mapping, lambda: (ModelOutput(a=draw(4, 6)),)),
    "hostile keys": (
        mapping,
        lambda: (
            {
                "a b": draw(4, 6),
                "a-b": draw(4, 6),
                "a_b": draw(4, 6),
                1: draw(4, 6),
                "class": draw(4, 6),
                "é": draw(4, 6),
                "": draw(4, 6),
            },
        ),
    ),
    "size": (sized, lambda: (draw(4, 6), torch.Size((6, 4)))),
    "words of python": (
        keyword_named,
        lambda: {"lambda": draw(4, 6), "a-b": draw(6), "a_b": draw(6), "a.b": draw(6)},
    ),
    "names of the generated code": (
        torch_named,
        lambda: (draw(4, 6), draw(6), draw(6), draw(6), draw(6)),
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_any_structure(name):
    forward, inputs = INPUTS[name]
    check_replay(net(forward), inputs())


def test_scalars_and_none_among_the_inputs():
    check_replay(net(positional), Call((draw(4, 6), None), {"scale": torch.tensor(2.0)}))


def test_the_inputs_may_share_memory_and_history():
    base = draw(4, 12).requires_grad_()
    left, right = (base * 2).chunk(2, dim=1)

    def forward(self, a, b):
        a.add_(1)
        return self.fc(a) * b

    check_replay(net(forward), (left, right))


@pytest.mark.parametrize("inputs", [3, "x", (), {}, [None], ({"a": 1},)])
def test_inputs_without_a_tensor_are_refused(inputs):
    with pytest.raises(CaptureError) as error:
        record(nn.Identity(), inputs)
    assert error.value.hint
