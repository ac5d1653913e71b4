"""Models by name: ``torchvision:resnet50``, ``timm:resnet50``, ``hf:DIR``, with their inputs.

No weights are loaded unless asked for, and nothing is downloaded unless allowed.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bnify.errors import BnifyError, SpecError
from bnify.spec.kinds import Target
from bnify.spec.offline import offline
from bnify.spec.usercode import call_factory, first_line
from bnify.structure import Call

BATCH = 2  # of default inputs: train mode needs two samples


class Entry(NamedTuple):
    """A model of a registry.

    Attributes:
        model: The model.
        call: Inputs that it takes; None where bnify knows none.
        notes: What the user should know.
    """

    model: nn.Module
    call: Call | None
    notes: tuple[str, ...] = ()


def load_registered(
    target: Target, arguments: Mapping[str, Any], *, pretrained: bool, allow_download: bool
) -> Entry:
    """Build the model that a registry knows under this name.

    Raises:
        SpecError: The registry is not installed or cannot be imported, does not know the name,
            refuses the arguments, or would have to download.
    """
    load = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}[target.place]
    guard: AbstractContextManager[list[str]] = nullcontext([]) if allow_download else offline()
    with guard as refused:
        try:
            return load(target, arguments, pretrained)
        except BnifyError as error:
            cause = error.__cause__
            is_local = target.place == "hf" and Path(target.name).expanduser().is_dir()
            remote = not is_local and (pretrained or target.place == "hf")
            if not refused and not (remote and not allow_download and isinstance(cause, OSError)):
                raise
            what = "its weights are" if pretrained else "its files are"
            tried = f" (asked for {refused[0]})" if refused else ""
            raise SpecError(
                f"{target.spec}: {what} not in the local cache, and downloads are off{tried}",
                hint="add --allow-download",
            ) from cause


def _import_registry(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise SpecError(f"{package} is not installed", hint=f"pip install {package}") from error
        raise _broken(package, error) from error
    except Exception as error:  # a package in pieces raises anything while it is imported
        raise _broken(package, error) from error


def _broken(package: str, error: Exception) -> SpecError:
    return SpecError(
        f"{package} is installed but cannot be imported: {first_line(error)}",
        hint=f"install builds of torch and {package} that belong together",
    )


def _unknown(target: Target, names: Sequence[str]) -> SpecError:
    near = difflib.get_close_matches(target.name, names, n=3)
    far = near or difflib.get_close_matches(target.name, names, n=3, cutoff=0.3) or names[:3]
    listed = ", ".join(f"{target.place}:{name}" for name in far)
    hint = f"did you mean {listed}?" if near else f"it has {len(names)}, for example {listed}"
    return SpecError(f"{target.place} has no model {target.name!r}", hint=hint)


def _call(
    builder: Callable[..., Any], arguments: Mapping[str, Any], target: Target, module: str
) -> Any:
    """Call a builder; a class of ``module`` that refuses an argument shows its signature."""
    try:
        return call_factory(builder, arguments, target.spec)
    except SpecError as error:
        refused = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword", str(error.__cause__))
        owner = getattr(sys.modules.get(module), refused[1], None) if refused else None
        if owner is None:
            raise
        raise SpecError(
            f"{target.spec}: {error.__cause__}; the signature is "
            f"{owner.__name__}{inspect.signature(owner)}",
            hint="pass arguments as --arg NAME=VALUE",
        ) from error.__cause__


# -- torchvision ---------------------------------------------------------------------------------

_INCEPTION_SIZES = {"inception_v3": 299, "quantized_inception_v3": 299}


def _torchvision(target: Target, arguments: Mapping[str, Any], pretrained: bool) -> Entry:
    _import_registry("torchvision", "torchvision")
    models = _import_registry("torchvision.models", "torchvision")
    name = target.name.lower()
    if name not in models.list_models():
        raise _unknown(target, models.list_models())
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in parameters and not pretrained:
        options["weights_backbone"] = None
    with warnings.catch_warnings():
        # inception_v3 and googlenet announce a change of their initialisation, for years now.
        warnings.filterwarnings("ignore", ".*init_weights.*", FutureWarning)
        model = _call(builder, options | dict(arguments), target, builder.__module__)
    call = _torchvision_call(builder, name, arguments)
    notes = () if call is not None else (f"{target.spec} brings no default input: pass --input",)
    return Entry(model, call, notes)


def _torchvision_call(
    builder: Callable[..., nn.Module], name: str, arguments: Mapping[str, Any]
) -> Call | None:
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    family = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    match family:
        case "detection":  # takes lists of images and returns as many boxes as it finds
            return None
        case "optical_flow":
            return Call((image(3, 128, 128), image(3, 128, 128)))
        case "video":
            pixels = 224 if name.startswith(("mvit", "swin3d", "s3d")) else 112
            return Call((image(3, 16, pixels, pixels),))
        case _:
            size = int(arguments.get("image_size", _INCEPTION_SIZES.get(name, 224)))
            return Call((image(3, size, size),))


# -- timm ----------------------------------------------------------------------------------------


def _timm(target: Target, arguments: Mapping[str, Any], pretrained: bool) -> Entry:
    timm = _import_registry("timm", "timm")
    name = target.name
    known = timm.list_models(pretrained=False)
    if ":" not in name and name.partition(".")[0] not in known:
        raise _unknown(target, known)

    def create_model(**options: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        return model

    defined_in = timm.model_entrypoint(name).__module__ if ":" not in name else ""
    model = _call(create_model, arguments, target, defined_in)
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", {})
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None or len(size) != 3:
        return Entry(model, None, (f"{target.spec} brings no default input: pass --input",))
    channels = int(arguments.get("in_chans", size[0]))
    pixels = arguments.get("img_size", size[1:])
    height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
    generator = torch.Generator().manual_seed(0)
    return Entry(model, Call((torch.randn(BATCH, channels, height, width, generator=generator),)))


# -- Hugging Face --------------------------------------------------------------------------------


def _hugging_face(target: Target, arguments: Mapping[str, Any], pretrained: bool) -> Entry:
    place = Path(target.name).expanduser()
    if not place.is_dir() and (place.is_absolute() or target.name.startswith(".")):
        raise SpecError(f"{target.spec}: there is no folder {target.name}", hint="check the path")
    if place.is_dir() and not (place / "config.json").is_file():
        raise SpecError(f"{target.spec}: no config.json in {target.name}", hint="check the path")
    transformers = _import_registry("transformers", "transformers")
    source = str(place) if place.is_dir() else target.name

    def read_config(**changes: Any) -> tuple[Any, dict[str, Any]]:
        found: tuple[Any, dict[str, Any]] = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, return_unused_kwargs=True, **changes
        )
        return found

    config, unused = call_factory(read_config, arguments, target.spec)
    if unused:
        raise SpecError(
            f"{target.spec}: {type(config).__name__} has no {', '.join(unused)}",
            hint=f"it has {', '.join(key for key in config.to_dict() if not key.startswith('_'))}",
        )
    names = getattr(config, "architectures", None) or ()
    factory = next((cls for n in names if (cls := getattr(transformers, n, None))), None)

    def build() -> Any:
        if pretrained:
            chosen = factory or transformers.AutoModel
            return chosen.from_pretrained(source, config=config, trust_remote_code=False)
        return factory(config) if factory else transformers.AutoModel.from_config(config)

    model = call_factory(build, {}, target.spec)
    call = _hugging_face_call(model, config)
    if call is None:
        return Entry(model, None, (f"{target.spec} brings no default input: pass --input",))
    return Entry(model, call)


def _hugging_face_call(model: nn.Module, config: Any) -> Call | None:
    generator = torch.Generator().manual_seed(0)
    match getattr(model, "main_input_name", None):
        case "pixel_values":
            size = getattr(config, "image_size", 224)
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(config, "num_channels", 3)
            pixels = torch.randn(BATCH, channels, height, width, generator=generator)
            return Call((), {"pixel_values": pixels})
        case "input_ids" if not getattr(config, "is_encoder_decoder", False):
            length = min(16, getattr(config, "max_position_embeddings", 16))
            words = getattr(config, "vocab_size", 0)
            if words < 1:
                return None
            ids = torch.randint(0, words, (BATCH, length), generator=generator)
            return Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        case _:
            return None
