"""How a method is written, parsed, built and named: ``dgl+man``, or as recipes hold it."""

from __future__ import annotations

import inspect
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from localgrad import methods, named
from localgrad.errors import ConfigError, nearest
from localgrad.method import Method
from localgrad.recipes import safe_yaml
from localgrad.task import Task

# What a YAML file may hold for one method: a name, or {name: {option: value}}; from the base to the outermost plug-in.
MethodSpec = list[str | dict[str, dict[str, Any] | None]]


def parse_method(text: str) -> MethodSpec:
    """``dgl+man``, or YAML such as ``[{dgl: {head: linear}}, man]``, as recipes hold them.

    Raises:
        ConfigError: it is neither.
    """
    import yaml

    if text.lstrip().startswith("["):
        try:
            found = safe_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"method {text!r} is no YAML; write '[{{dgl: {{head: linear}}}}]'") from error
        if not isinstance(found, list):
            raise ConfigError(f"method {text!r} is no list; write '[{{dgl: {{head: linear}}}}]'")
        return found
    parts = [part.strip() for part in text.split("+")]
    if not all(parts):
        raise ConfigError(f"method {text!r} has an empty part; write base+plugin, for instance dgl+windows")
    return list(parts)


def plain(spec: MethodSpec) -> MethodSpec:
    """The same method in one form: a part without options is its name."""
    return [{name: options} if options else name for name, options in _parts(spec)]


def method_name(spec: MethodSpec) -> str:
    """``dgl+windows``: the names without their options."""
    return "+".join(name for name, _ in _parts(spec))


def described(spec: MethodSpec) -> str:
    """``dgl(head=linear)+man``."""
    texts = []
    for name, options in _parts(spec):
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        texts.append(f"{name}({given})" if given else name)
    return "+".join(texts)


def as_code(spec: MethodSpec) -> str:
    """The Python that builds the method: ``localgrad.methods.man(localgrad.methods.dgl(task))``."""
    text = "task"
    for name, options in _parts(spec):
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        function = name.replace(":", ".") if named.is_named(name) else f"localgrad.methods.{name}"
        text = f"{function}({text}{given})"
    return text


def _parts(spec: MethodSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the options of each part, from the base on."""
    for part in spec:
        name, options = (part, None) if isinstance(part, str) else next(iter(part.items()), ("?", None))
        yield name, options or {}


def known_methods() -> dict[str, bool]:
    """Name -> whether it is a base (takes a task) or a plug-in (takes a method)."""
    return {name: _is_base(getattr(methods, name)) for name in methods.__all__}


def _is_base(function: Callable[..., Any]) -> bool:
    return next(iter(inspect.signature(function).parameters), None) == "task"


def build_method(
    spec: MethodSpec,
    task: Task,
    *,
    load_model: Callable[[str], nn.Module] | None = None,
) -> Method:
    """The method a specification names, base first.

    Args:
        spec: names with their options; ``module:function`` is one of the user's, a base if its first parameter is
            called ``task``, else a plug-in. It returns a `localgrad.Method`.
        task: what the base takes.
        load_model: makes a model of an option ``teacher`` that is a path.

    Raises:
        ConfigError: an unknown name, a plug-in where a base must stand or the reverse, an unknown or wrong option.
        MethodError: parts that cannot be combined.
    """
    known = known_methods()
    value: Any = task
    if not spec:
        raise ConfigError("method: []; name a base, for instance method: [dgl]")
    for position, part in enumerate(spec):
        entries = {part: None} if isinstance(part, str) else part
        if len(entries) != 1:
            raise ConfigError(f"method: {part!r} must hold one name, as in {{pgl: {{every: 10}}}}")
        ((name, options),) = entries.items()
        if name not in known and not named.is_named(name):
            raise ConfigError(nearest(name, known, "method") + "; your own is written module:function")
        function = getattr(methods, name) if name in known else named.function(name, "method")
        base = _is_base(function)
        if base != (position == 0):
            bases = ", ".join(n for n, base in known.items() if base)
            raise ConfigError(
                f"method {method_name(spec)!r}: {name!r} is a "
                + ("base and must come first; plug-ins follow it" if base else f"plug-in; begin with one of {bases}")
            )
        parameters = list(inspect.signature(function).parameters.values())[1:]
        allowed = [p.name for p in parameters]
        for option in options or {}:
            if option not in allowed and not any(p.kind is p.VAR_KEYWORD for p in parameters):
                raise ConfigError(
                    f"method.{name}: {nearest(option, allowed, 'option')}"
                    if allowed
                    else f"method.{name} has no options"
                )
        given = dict(options or {})
        if isinstance(given.get("teacher"), str) and load_model is not None:
            given["teacher"] = load_model(given["teacher"])
        value = _called(name, function, value, given)
        if not isinstance(value, Method):
            raise ConfigError(f"method {name!r} returned a {type(value).__name__}; it must return a localgrad.Method")
    return value


def _called(name: str, function: Any, argument: Any, options: dict[str, Any]) -> Any:
    """``function(argument, **options)``, the options converted to the types it declares."""
    from pydantic import ConfigDict, ValidationError, validate_call

    hints = _hints(function)
    try:
        for option, value in options.items():
            refuse_booleans(f"method.{name}.{option}", value, hints.get(option, Any))
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(_checked(function, hints))(
            argument, **options
        )
    except ValidationError as error:
        raise ConfigError(f"method.{name}: " + "; ".join(complaints(error))) from error


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # of the user's, which may name types for checkers only
        return {}


def refuse_booleans(place: str, value: Any, hint: Any) -> None:
    """Raise `ConfigError` where a boolean stands for a number, which pydantic would read as 0 or 1."""

    def takes(hint: Any) -> bool:
        return hint in (bool, Any, str) or any(takes(part) for part in typing.get_args(hint))

    if any(isinstance(one, bool) for one in (value if isinstance(value, (list, tuple)) else [value])) and not takes(
        hint
    ):
        raise ConfigError(f"{place}={value!r}; it must be a number, not a boolean")


def _checked(function: Any, hints: dict[str, Any]) -> Any:
    """``function`` with its first argument, a task or a method, left to itself: pydantic checks the options only."""
    signature = inspect.signature(function)
    first, *rest = signature.parameters.values()
    parameters = [first.replace(annotation=Any), *(p.replace(annotation=hints.get(p.name, Any)) for p in rest)]

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = signature.replace(parameters=parameters, return_annotation=Any)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def complaints(error: Any, keys: Callable[[Sequence[str]], Sequence[str]] = lambda place: ()) -> Iterator[str]:
    """What pydantic found wrong; ``keys`` tells which settings there are at a place."""
    for problem in error.errors()[:5]:
        unknown = problem["type"] == "unexpected_keyword_argument"
        at = [str(part) for part in problem["loc"]]
        # Pydantic names the type it tried, as in "list[str]". An unknown key is what the user wrote, brackets or not.
        place = [part for k, part in enumerate(at, 1) if "[" not in part or (unknown and k == len(at))]
        path = ".".join(place)
        if unknown:
            known = keys(place[:-1])
            yield f"{path}: " + nearest(place[-1], known, "setting") if known else f"{path}: unknown setting"
        elif "ctx" in problem and isinstance(problem["ctx"].get("error"), ConfigError):
            yield str(problem["ctx"]["error"])
        elif problem["type"] == "missing_keyword_only_argument":
            yield f"{path} is missing; write its value, as in {{{path}: ...}}"
        elif problem["type"] == "missing":
            yield f"{path}: missing; for instance {path}: [dgl]" if path == "method" else f"{path}: missing"
        else:
            where = f"{path}: " if path else ""
            yield f"{where}{problem['msg']} (got {textwrap.shorten(repr(problem['input']), 100)})"
