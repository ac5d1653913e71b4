"""The bytes of an ONNX file and of the weights beside it. Nothing in it is believed or run.

Every size that a file claims is compared with the bytes that are there before memory is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bnify.errors import WeightsError

_REWRITE: Final = "write the file again, or copy it anew"
_LFS: Final = b"version https://git-lfs"
_EXTERNAL: Final = 1  # TensorProto.EXTERNAL
_BFLOAT16: Final = 16
#: TensorProto.DataType → numpy, of the types that weights and statistics are stored in.
_TYPES: Final = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
#: Which field holds the numbers that are not raw bytes.
_FIELDS: Final = {1: "float_data", 11: "double_data", 7: "int64_data", 12: "uint64_data",
                  13: "uint64_data"}  # fmt: skip


def damaged(path: Path, why: str, hint: str = _REWRITE) -> WeightsError:
    """The error for a file that is not what it says it is."""
    return WeightsError(f"{path} cannot be read as an ONNX file: {why}", hint=hint)


def read_model(path: Path) -> Any:
    """The file as a ModelProto; weights beside it are not read.

    Raises:
        WeightsError: It is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or str(error), "check the path") from error
    if not data:
        raise damaged(path, "it is empty")
    if data.startswith(_LFS):
        raise damaged(path, "it is the pointer of a Git LFS file", "git lfs pull")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise damaged(path, "it is no protobuf, or was cut off") from error
    if model.ir_version < 1 or not model.HasField("graph"):
        raise damaged(path, "it holds no graph")
    if not _is_text(model):
        raise damaged(path, "a name in it is no text")
    return model


def _is_text(message: Any) -> bool:
    """Whether every string is one: protobuf hands out those that are not UTF-8 as bytes."""
    if message.DESCRIPTOR.name == "TensorProto":  # the rest may be large, and is numbers
        return isinstance(message.name, str) and all(map(_is_text, message.external_data))
    for kind, content in message.ListFields():
        repeated = not isinstance(content, (str, bytes)) and hasattr(content, "__len__")
        values = content if repeated else (content,)
        if kind.type == kind.TYPE_STRING and not all(isinstance(v, str) for v in values):
            return False
        if kind.type == kind.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
    return True


class Tensors:
    """Decodes the tensors of one file.

    Args:
        path: The ONNX file; its folder is the only place that external data is read from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes: dict[Path, int] = {}

    def check(self, tensor: Any) -> None:
        """Refuse a tensor that claims more than there is.

        Raises:
            WeightsError: It does, or its external data is missing or outside the folder.
        """
        count = self._count(tensor)
        if tensor.data_location == _EXTERNAL:
            self._place(tensor, count)
        elif count > 2 * tensor.ByteSize():  # the smallest element has 4 bits
            raise self._fault(tensor, f"claims {count} numbers and has none of them")

    def value(self, tensor: Any) -> NDArray[Any] | None:
        """The tensor as numpy, bfloat16 as float32; None for types without a number in them.

        Raises:
            WeightsError: Its bytes are not as many as its shape needs.
        """
        kind = tensor.data_type
        if kind not in _TYPES:
            return None
        count = self._count(tensor)
        stored = np.dtype("uint16" if kind == _BFLOAT16 else _TYPES[kind])
        raw = self._raw(tensor, count)
        if raw is not None:
            if len(raw) != count * stored.itemsize:
                needs = count * stored.itemsize
                raise self._fault(tensor, f"has {len(raw)} bytes and its shape needs {needs}")
            array = np.frombuffer(raw, dtype=stored.newbyteorder("<"))
        else:
            array = self._typed(tensor, kind, stored)
            if array.size != count:
                raise self._fault(tensor, f"has {array.size} numbers and its shape needs {count}")
        if kind == _BFLOAT16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(tuple(tensor.dims))

    @staticmethod
    def dtype(tensor: Any) -> str:
        """The type as stored: ``"float32"``, ``"bfloat16"``."""
        return _TYPES.get(tensor.data_type, "unknown")

    # -- bytes -----------------------------------------------------------------------------------

    def _count(self, tensor: Any) -> int:
        if any(size < 0 for size in tensor.dims):
            raise self._fault(tensor, f"has the shape {list(tensor.dims)}")
        return prod(tensor.dims)

    def _typed(self, tensor: Any, kind: int, stored: np.dtype[Any]) -> NDArray[Any]:
        numbers = getattr(tensor, _FIELDS.get(kind, "int32_data"))
        if kind in (10, _BFLOAT16):  # as bits
            bits = np.array(numbers, dtype=np.int64).astype(np.uint16)
            return bits.view(stored)
        wide = np.float64 if stored.kind == "f" else np.uint64 if stored.kind == "u" else np.int64
        return np.array(numbers, dtype=wide).astype(stored)

    def _raw(self, tensor: Any, count: int) -> bytes | None:
        if tensor.data_location == _EXTERNAL:
            file, offset, length = self._place(tensor, count)
            with file.open("rb") as stream:
                stream.seek(offset)
                return stream.read(length)
        return bytes(tensor.raw_data) if tensor.HasField("raw_data") else None

    def _place(self, tensor: Any, count: int) -> tuple[Path, int, int]:
        """File, offset and length of external data.

        Raises:
            WeightsError: There is no such place, or it is not in the folder of the file.
        """
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        parts = PureWindowsPath(location)  # knows both kinds of slashes
        if not location or parts.is_absolute() or parts.anchor or ".." in parts.parts:
            raise self._fault(tensor, f"has its data outside the folder of the file ({location!r})")
        file = self.path.parent / location
        if file not in self._sizes:
            if not file.is_file():
                raise WeightsError(
                    f"{self.path} keeps its weights in {location!r}, which is not beside it",
                    hint="copy both files into one folder, under the names they were written with",
                )
            self._sizes[file] = file.stat().st_size
        try:
            offset = int(entry.get("offset") or 0)
            length = int(entry.get("length") or self._sizes[file] - offset)
        except ValueError:
            raise self._fault(tensor, "has external data without a place in its file") from None
        if offset < 0 or length < 0 or offset + length > self._sizes[file] or count > 2 * length:
            raise self._fault(
                tensor, f"wants bytes {offset} to {offset + length} of {location!r}, "
                f"which has {self._sizes[file]}"
            )  # fmt: skip
        return file, offset, length

    def _fault(self, tensor: Any, what: str) -> WeightsError:
        return damaged(self.path, f"tensor {shown(tensor.name) or '(unnamed)'} {what}")


def shown(name: str, most: int = 160) -> str:
    """A name from a file as it may stand in a line of text."""
    text = "".join(c if c.isprintable() else "?" for c in name[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def every_tensor(model: Any) -> Iterator[Any]:
    """Every stored tensor: of graphs, subgraphs, functions and their attributes."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            inner = [attribute.g] if attribute.HasField("g") else []
            for graph in (*inner, *attribute.graphs):
                yield from _tensors_of_graph(graph)
