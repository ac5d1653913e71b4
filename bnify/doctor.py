"""What is installed here, what computes where, and what is missing. Data only; report prints it."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import bnify
from bnify.errors import BnifyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something that is not there.

    Attributes:
        name: The package or the device.
        why: What does not work without it.
        hint: The line to run.
        required: Whether bnify needs it; else only some of its uses do.
    """

    name: str
    why: str
    hint: str
    required: bool


def examine() -> dict[str, Any]:
    """Versions, execution providers and devices, and what is missing, as JSON-ready data.

    Returns:
        ``bnify``, ``python``, ``platform``: versions. ``packages``: name → ``version`` (None if
        absent), ``needs``, ``required``, ``ok``. ``providers``: onnxruntime's, best first.
        ``cuda``: ``torch``, ``onnxruntime`` (booleans), ``why`` torch has none, ``devices``.
        ``missing``: a list of :class:`Missing`. ``ok``: everything required is there.
    """
    packages = _packages()
    missing = [_missing(name, package) for name, package in packages.items() if not package["ok"]]
    cuda: dict[str, Any] = {"torch": False, "onnxruntime": False, "why": None, "devices": []}
    providers: list[str] = []
    if packages["torch"]["version"]:
        cuda |= _cuda()
    if packages["onnxruntime"]["version"]:
        providers, problem = _providers()
        cuda["onnxruntime"] = "CUDAExecutionProvider" in providers
        missing += [problem] if problem else []
    if cuda["why"]:
        why = f"{cuda['why']}; everything runs on the CPU"
        hint = "install a CUDA build of torch where there is a GPU: https://pytorch.org/get-started"
        missing.append(Missing(name="CUDA", why=why, hint=hint, required=False))
    if cuda["torch"] and providers and not cuda["onnxruntime"]:
        missing.append(
            Missing(
                name="CUDAExecutionProvider",
                why="torch computes on CUDA, ONNX files run on the CPU",
                hint="pip uninstall -y onnxruntime onnxruntime-gpu\npip install onnxruntime-gpu",
                required=False,
            )
        )
    return {
        "schema": 1,
        "bnify": bnify.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "packages": packages,
        "providers": providers,
        "cuda": cuda,
        "missing": [asdict(item) for item in missing],
        "ok": not any(item.required for item in missing),
    }


# What each package that is not strictly needed is for.
_USES = {
    "torchvision": "torchvision: specs and their default inputs",
    "timm": "timm: specs and their default inputs",
    "scikit-learn": "the digits demonstration",
    "transformers": "hf: specs",
}
_REQUIRED = {
    "torch": "everything",
    "numpy": "everything",
    "safetensors": "reading and writing weights",
    "onnx": "writing and reading ONNX files",
    "onnxruntime": "running ONNX files",
    "onnxscript": "torch's ONNX exporter",
    "typer": "the command line",
    "rich": "the command line",
}


def _packages() -> dict[str, dict[str, Any]]:
    needs = _declared()
    found: dict[str, dict[str, Any]] = {}
    for name in (*_REQUIRED, *_USES):
        version = _version(name)
        if version is None and name == "onnxruntime":
            version = _version("onnxruntime-gpu")  # the same module from another package
        minimum = needs.get(name, "")
        found[name] = {
            "version": version,
            "needs": f">={minimum}" if minimum else "",
            "required": name in _REQUIRED,
            "ok": version is not None and _at_least(version, minimum),
        }
    return found


def _declared() -> dict[str, str]:
    """Least versions as bnify's own metadata declares them; none when run from a bare checkout."""
    try:
        lines = metadata.requires("bnify") or []
    except metadata.PackageNotFoundError:
        return {}
    pattern = re.compile(r"^([\w.-]+)\s*>=\s*([\w.]+)")
    return {match[1]: match[2] for line in lines if (match := pattern.match(line))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _at_least(version: str, minimum: str) -> bool:
    def key(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])

    return not minimum or key(version) >= key(minimum)


def _missing(name: str, package: dict[str, Any]) -> Missing:
    required, version = package["required"], package["version"]
    use = _REQUIRED[name] if required else _USES[name]
    why = f"needed for {use}"
    if version is not None:
        why = f"{version} is too old, {package['needs']} is {why}"
    wanted = f"{name}{package['needs']}"
    return Missing(name=name, why=why, hint=f"pip install '{wanted}'", required=required)


def _cuda() -> dict[str, Any]:
    import torch

    from bnify import devices

    why = devices.missing_cuda()
    names = [] if why else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": why is None,
        "why": why,
        "devices": names,
        "precision": devices.precision_settings(),
    }


def _providers() -> tuple[list[str], Missing | None]:
    try:
        import onnxruntime
    except Exception as error:  # two packages over each other can leave anything behind
        hint = "pip uninstall -y onnxruntime onnxruntime-gpu\npip install onnxruntime"
        why = f"it is installed but cannot be imported: {error}"
        return [], Missing(name="onnxruntime", why=why, hint=hint, required=True)
    from bnify import devices

    try:
        devices.refuse_two_runtimes()
    except BnifyError as error:
        problem = Missing(name="onnxruntime", why=error.message, hint=error.hint, required=True)
        return list(onnxruntime.get_available_providers()), problem
    return list(onnxruntime.get_available_providers()), None
