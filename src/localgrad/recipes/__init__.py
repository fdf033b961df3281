"""Recipes: settings that are written down once, as YAML rows that extend one another, and their reader."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from localgrad.errors import ConfigError, nearest

RECIPES = Path(__file__).parent
COSTS = RECIPES / "_costs.json"


def safe_yaml(text: str) -> Any:
    """What YAML says, in plain Python: mappings with words as keys, lists, text, numbers, booleans, null.

    Numbers are those of YAML 1.2, so ``1e-3`` is one, and dates are text. A key that is written twice is refused, as
    YAML demands; so is what is nested, or by aliases refers to itself, more than `_DEPTH` levels deep.

    Raises:
        yaml.YAMLError: not YAML, or not of that kind.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what `yaml.SafeLoader` silently drops."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, form) for tag, form in known if not tag.endswith((":timestamp", ":float", ":value"))]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if isinstance(name, Hashable) and name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {name!r} is written twice", key.start_mark
                    )
                seen.add(name)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for size, (tag, value, depth, mark) in enumerate(_nodes(node)):
            if depth > _DEPTH or size > _SIZE:
                raise yaml.YAMLError(f"more than {_DEPTH} levels or {_SIZE} values, aliases written out{mark}")
            if tag not in _PLAIN:
                raise yaml.YAMLError(f"{tag} is not read; write text, numbers, true, null, lists or mappings{mark}")
            if tag == "int" and not _INT.fullmatch(value):
                raise yaml.YAMLError(f"{value[:50]!r} is no whole number of up to 100 digits without a leading 0{mark}")
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError(f"nested more than {_DEPTH} levels deep") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # what an explicit tag refuses
        raise yaml.YAMLError(f"a value does not suit its tag: {error}") from error
    finally:
        loader.dispose()


_FLOAT = re.compile(
    r"[-+]?(([0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,99}|0x[0-9a-fA-F]{1,99})")
_PLAIN = ("str", "int", "float", "bool", "null", "seq", "map", "merge")
_DEPTH, _SIZE = 50, 100_000


def _nodes(node: Any, depth: int = 0) -> Iterator[tuple[str, Any, int, str]]:
    """Tag, value, depth and place of a YAML node and of all below it, those of aliases each time they stand."""
    yield node.tag.rpartition(":")[2], node.value, depth, f", line {node.start_mark.line + 1}"
    if isinstance(node.value, list):
        for entry in node.value:
            for part in entry if isinstance(entry, tuple) else (entry,):
                yield from _nodes(part, depth + 1)


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe that ships with localgrad."""
    return {
        path.relative_to(RECIPES).with_suffix("").as_posix(): path
        for path in sorted(RECIPES.rglob("*.yaml"))
        if not path.name.startswith("_")
    }


def recipe_costs() -> dict[str, dict[str, Any]]:
    """Name -> what a recipe costs, as ``bench/recipe_costs.py`` of the repository measured it."""
    costs: dict[str, dict[str, Any]] = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}
    return costs


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, by name or as the path of a YAML file, with everything it extends merged in.

    Raises:
        ConfigError: no such recipe or file, not YAML, not a mapping, or recipes that extend each other in a circle.
    """
    return _read(_locate(name.removeprefix("recipe:"), None), ())


def _locate(name: str, beside: Path | None) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name) if beside is None or Path(name).is_absolute() else beside.parent / name
        if not path.is_file():
            raise ConfigError(f"no file {str(path)!r}; give the path of a YAML file or one of `localgrad list recipes`")
        return path
    path = RECIPES / f"{name}.yaml"
    private = path.name.startswith("_")  # only for other recipes
    if re.fullmatch(r"\w[\w/.-]*", name) and ".." not in name and path.is_file() and (beside or not private):
        return path
    raise ConfigError(nearest(name, recipes(), "recipe") + ". A file of your own ends in .yaml")


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    import yaml

    if path.resolve() in [known.resolve() for known in chain]:
        raise ConfigError(f"recipes extend each other in a circle: {' -> '.join(p.name for p in (*chain, path))}")
    try:
        content = safe_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: expected a mapping such as 'train: {{epochs: 10}}', found {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    return merge(_read(_locate(str(parent), path), (*chain, path)), content)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(settings: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Lay ``a.b=value`` over the settings; values are read as YAML.

    Raises:
        ConfigError: not of that form.
    """
    import yaml

    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not re.fullmatch(rf"\w+(\.\w+){{0,{_DEPTH}}}", key):
            raise ConfigError(f"{assignment!r} is no setting; write section.name=value, for instance optim.lr=0.05")
        try:
            change: Any = safe_yaml(text)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())[:200]
            raise ConfigError(f"{key}={text[:60]!r} is not a YAML value: {why}") from error
        for part in reversed(key.split(".")):
            change = {part: change}
        settings = merge(settings, change)
    return settings
