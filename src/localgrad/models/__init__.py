"""Networks: the papers' CIFAR ResNets, and those of timm, torchvision, segmentation_models_pytorch and transformers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from localgrad import named
from localgrad.errors import ConfigError, nearest
from localgrad.models.batchnorm import freeze_batchnorm
from localgrad.models.chunked_lm import ChunkedLM, causal_lm, causal_types
from localgrad.models.detection import Detector, fcos, retinanet
from localgrad.models.pretrained import load_pretrained
from localgrad.models.resnet_cifar import CifarResNet, resnet8, resnet20, resnet32, resnet56, resnet110
from localgrad.models.small_vit import SmallViT, vit8

__all__ = [
    "ChunkedLM",
    "CifarResNet",
    "Detector",
    "SmallViT",
    "available",
    "create",
    "fcos",
    "freeze_batchnorm",
    "load_pretrained",
    "resnet110",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet8",
    "retinanet",
    "vit8",
]

OWN: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f for f in (resnet8, resnet20, resnet32, resnet56, resnet110, vit8, retinanet, fcos)
}
LIBRARIES = ("timm", "torchvision", "smp", "transformers")


def _library_names(library: str) -> list[str]:
    if library == "timm":
        try:
            import timm
        except ImportError as error:
            raise ConfigError("models from timm need it installed: pip install localgrad[timm]") from error
        return timm.list_models()
    if library == "transformers":
        return causal_types()
    if library == "smp":
        return sorted(type_.__name__ for type_ in _smp().MODEL_ARCHITECTURES_MAPPING.values())
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision cannot be imported ({error}): a CPU build of torch beside a CUDA build of torchvision does "
            "that; install a matching pair, see `localgrad doctor`"
        ) from error
    return torchvision.models.list_models(module=torchvision.models)


def _smp() -> Any:
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise ConfigError(
            "models written smp:NAME need segmentation_models_pytorch: pip install localgrad[segmentation]"
        ) from error
    return segmentation_models_pytorch


def _segmentation_names(library: str) -> list[str]:
    """Those of torchvision's names that answer with a class for every pixel."""
    if library != "torchvision":
        return []
    import torchvision

    return torchvision.models.list_models(module=torchvision.models.segmentation)


def available(library: str | None = None) -> list[str]:
    """Names `create` accepts: our own, or those of one of `LIBRARIES`, with its prefix."""
    if library is None:
        return list(OWN)
    if library not in LIBRARIES:
        raise ConfigError(nearest(library, LIBRARIES, "model library"))
    return [f"{library}:{name}" for name in _library_names(library)]


def made_for(name: str) -> tuple[int, int]:
    """Sides of images, in pixels, and classes that a model is taken to be for: ImageNet if of a library, else CIFAR."""
    return (224, 1000) if name.partition(":")[0] in LIBRARIES else (32, 10)


def create(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | None = None,
    context: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: ``resnet32``, ``timm:vit_tiny_patch16_224``, ``torchvision:resnet50``; for segmentation
            ``torchvision:deeplabv3_resnet50``, or ``smp:Unet`` of segmentation_models_pytorch; for text
            ``transformers:llama``, any causal language model of it, or a folder with its ``config.json``.
            ``module:function`` is a function of the user's that takes ``num_classes`` and options, also
            ``in_channels``, ``image_size`` and ``context`` if it names them, and returns a module.
        num_classes: outputs; tokens of a language model.
        in_channels: of the images; torchvision's models take 3 only.
        image_size: passed on to models that are built for one size.
        context: tokens of the longest sequence, for language models.
        options: passed to the constructor.

    Raises:
        ConfigError: an unknown name, a library that is not installed, or options the constructor refuses.

    Example:
        >>> import localgrad
        >>> sum(p.numel() for p in localgrad.models.create("resnet32").parameters())
        466906
    """
    library, _, short = name.rpartition(":")
    if library == "transformers":
        if image_size is not None:
            raise ConfigError(
                f"{name} reads tokens; train it on text, written text:PATH. Only models of images can be planned, "
                "summarised and run by bench and simulate"
            )
        return causal_lm(short, num_classes, context, options)
    if context is not None and not named.is_named(name):
        raise ConfigError(
            f"{name} reads images, and the data are text; models that read tokens are written transformers:NAME, for "
            "instance transformers:llama, your own module:function"
        )
    if library and library not in LIBRARIES:
        settings = {
            "num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "context": context,
        }  # fmt: skip
        return _own(name, settings, options)
    if not library and short not in OWN:
        raise ConfigError(
            nearest(short, OWN, "model")
            + ". Models of libraries are written timm:NAME, torchvision:NAME, smp:NAME and transformers:NAME, "
            "your own module:function"
        )
    dense = library == "torchvision" and short in _segmentation_names(library)
    if library and not dense and short not in _library_names(library):
        raise ConfigError(_unknown(short, library))
    if library == "torchvision" and in_channels != 3:
        raise ConfigError(f"{name} reads 3-channel images, the data has {in_channels}; look for one of timm's instead")
    try:
        if library == "timm":
            import timm

            settings = {"num_classes": num_classes, "in_chans": in_channels, **options}
            return _sized(timm.create_model, short, "img_size", image_size, settings)
        if library == "torchvision":
            import torchvision

            if short in ("googlenet", "inception_v3"):  # in training they return a named tuple of three classifiers
                options.setdefault("aux_logits", False)
                options.setdefault("init_weights", True)
            settings = {"weights": None, "num_classes": num_classes, **options}
            if dense:  # else they ask for the weights of their backbone
                return torchvision.models.get_model(short, **{"weights_backbone": None, **settings})
            return _sized(torchvision.models.get_model, short, "image_size", image_size, settings)
        if library == "smp":
            settings = {"encoder_weights": None, "in_channels": in_channels, "classes": num_classes, **options}
            model = _smp().create_model(short, **settings)
            # The check compares sizes with numbers, which torch.fx cannot where separate blocks are made; sizes that do
            # not fit fail all the same.
            model.requires_divisible_input_shape = False
            return model
        return OWN[short](num_classes=num_classes, in_channels=in_channels, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model {name!r} cannot be built with {options or 'these settings'}: {error}") from error


def _own(name: str, settings: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """What a function of the user's returns; of ``settings`` it gets the number of classes, and what else it names."""
    hint = nearest(name.partition(":")[0], LIBRARIES, "model library")
    if not named.is_named(name):
        raise ConfigError(f"{hint}; your own is written module:function")
    function = named.function(name, "model", hint)
    try:
        parameters = inspect.signature(function).parameters
        given = {key: value for key, value in settings.items() if key in parameters}
        if "num_classes" not in parameters:
            raise TypeError(
                f"it takes ({', '.join(parameters)}); write def {name.rpartition(':')[2]}(num_classes, ...)"
            )
        model = function(**given, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model {name!r} cannot be built with {options or 'these settings'}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _unknown(name: str, library: str) -> str:
    known = _library_names(library)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(known)} others"
    return f"unknown {library} model {name!r}; {hint} See localgrad.models.available({library!r})"


def _sized(
    build: Callable[..., nn.Module], name: str, argument: str, image_size: int | None, settings: dict[str, Any]
) -> nn.Module:
    """Build with an image size, or without where the constructor takes none: convolutional models take any size."""
    if image_size is not None:
        try:
            return build(name, **settings, **{argument: image_size})
        except TypeError as error:
            if argument not in str(error):
                raise
    return build(name, **settings)
