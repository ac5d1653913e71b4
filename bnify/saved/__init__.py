"""The folder that a verb writes with ``-o``: four files, no pickle, whole or not at all.

``model.safetensors`` holds the weights; ``bnify.json`` SPEC, plan, versions and hashes, all that
is needed to rebuild the model; ``model.onnx`` was exported from an eval copy and checked in
onnxruntime; ``report.json`` is what the verb found, as ``--format json`` prints it.
"""

from __future__ import annotations

from bnify.saved.folder import OURS, SavedFolder, read
from bnify.saved.load import load
from bnify.saved.write import Saved, save, source_of, write

__all__ = ["OURS", "Saved", "SavedFolder", "load", "read", "save", "source_of", "write"]
