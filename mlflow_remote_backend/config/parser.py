"""backend_config -> BackendConfig, in layers; and the JSON Schema of what is accepted.

Three layers say what holds: the caller's backend_config, over the named compute that it asks for, over the defaults.
Each is checked on its own, so that a message names the file that a wrong value stands in. Then mappings are merged,
scalars and lists replaced, and a null takes back what the layer under it says.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..job import Limits
from .files import parse_json, read_json, read_yaml
from .keys import ALIASES, ALL_KEYS, COMPUTE_NAME, KEYS, Alias
from .kinds import Kind, Masked, Open, Place, UnknownKey, map_of, merged, nullable, quoted
from .options import BackendConfig, CliContext, DockerOptions

COMPUTES = ("local", "docker", "kubernetes")
COMPUTE_GROUP = "mlflow_remote_backend.compute"  # entry points of computes that others make
FILE_NAME = "mlflow-remote.yaml"

Layer = tuple[Place, dict[str, Any]]


def parse(
    raw: Mapping[str, Any] | str | None,
    *,
    project_dir: Path | None,
    environ: Mapping[str, str],
    cli: CliContext | None = None,
    origin: str = "backend_config",
) -> BackendConfig:
    """Understand a backend_config: a mapping, the path of a ``.json`` file, or JSON text. Reads files, changes nothing.

    ``project_dir``: relative paths start there, and its ``mlflow-remote.yaml`` is read; None for a project that is not
    on this machine yet: then they start in the current folder. ``environ``: the caller's variables.
    ``origin``: what messages call it. Raises ConfigError.
    """
    here = Place(origin, Path(os.path.abspath(project_dir or ".")), Path(environ.get("HOME") or Path.home()))
    said = _read(_mapping(raw, here), here)
    layers, compute_name = [(here, said)], ""
    compute = said.get("compute") or "local"
    files = _candidates(project_dir, environ, here.home)
    named = _named_computes(files, here)
    if compute not in COMPUTES and compute in named:
        layers.append(_named_layer(compute, *named[compute], here))
        compute, compute_name = layers[1][1]["compute"], compute
    elif compute not in COMPUTES and compute not in installed_computes():
        raise _unknown_compute(compute, named, files, here)
    config = _assemble(layers, compute, environ)
    config = dataclasses.replace(config, compute_name=compute_name)
    return _with_command_line(config, cli or CliContext(), here)


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of backend_config, with the sections of installed computes."""
    whole = KEYS.schema()
    properties = whole["properties"]
    for alias in ALIASES:
        section, _, name = alias.name.rpartition(".")
        said = nullable((alias.kind or ALL_KEYS[alias.key].kind).schema())
        entry = {"title": name, "description": f"Another spelling of `{alias.key}`.", **said}
        (properties[section]["properties"] if section else properties)[name] = entry
    for name in sorted(installed_computes() - properties.keys()):
        properties[name] = {"title": name, "type": ["object", "null"]}
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": "backend_config of mlflow-remote-backend", **whole}


def named_computes(environ: Mapping[str, str]) -> list[str]:
    """Names of the computes that the user's own ``mlflow-remote.yaml`` defines. Raises ConfigError."""
    home = Path(environ.get("HOME") or Path.home())
    return list(_named_computes(_candidates(None, environ, home), Place("mlflow-remote.yaml", Path.cwd(), home)))


def installed_computes() -> set[str]:
    """Names of the computes that other distributions bring, by entry points of ``mlflow_remote_backend.compute``."""
    from importlib.metadata import entry_points

    return {point.name for point in entry_points(group=COMPUTE_GROUP)}


# --------------------------------------------------------------------------------------------------------- one layer


def _mapping(raw: object, place: Place) -> Mapping[Any, Any]:
    value = raw
    if isinstance(raw, str):
        value = read_json(Path(raw)) if raw.endswith(".json") else parse_json(raw, place.origin)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise place.refused(value, "a mapping, the path of a .json file, or JSON text of a mapping")
    return value


def _read(raw: Mapping[Any, Any], place: Place) -> dict[str, Any]:
    """What one layer says: canonical keys with checked values; None takes back what the layer under it says."""
    rest, spelled = _split_aliases(raw)
    unknown = rest.keys() - {key.name for key in KEYS.keys}
    extensions = unknown & installed_computes() if unknown else set()
    try:
        said: dict[str, Any] = KEYS.read({name: one for name, one in rest.items() if name not in extensions}, place)
        for alias, value in spelled:
            _lay(said, alias, value, place)
    except UnknownKey as error:
        raise _unknown_key(error) from None
    sections = {name: rest[name] for name in extensions if rest[name] is not None}
    said["extensions"] = {name: Open().read(one, place.child(name)) for name, one in sections.items()}
    return said


def _split_aliases(raw: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[tuple[Alias, Any]]]:
    """The mapping without other spellings, copied as deep as those stand, and the other spellings that are not None."""
    sections = {alias.name.rpartition(".")[0] for alias in ALIASES}
    rest = {n: dict(one) if n in sections and isinstance(one, Mapping) else one for n, one in raw.items()}
    spelled = []
    for alias in ALIASES:
        section, _, name = alias.name.rpartition(".")
        inside = rest.get(section) if section else rest
        if isinstance(inside, dict) and (value := inside.pop(name, None)) is not None:
            spelled.append((alias, value))
    return rest, spelled


def _lay(said: dict[str, Any], alias: Alias, value: Any, place: Place) -> None:
    """Add what an alias says to a layer. ConfigError if the layer says something else already."""
    key = ALL_KEYS[alias.key]
    value = alias.convert((alias.kind or key.kind).read(value, place.child(alias.name, secret=key.secret)))
    if value is None:
        return
    section = alias.key.rpartition(".")[0]
    inside = said
    if section:
        inside = said[section] = said.get(section) or {}
    if inside.get(key.name) not in (None, value):
        same = [alias.key, *(other.name for other in ALIASES if other.key == alias.key and other is not alias)]
        option = f"(the option {alias.option}) " if alias.option else ""
        trouble = f"{option}and {' or '.join(quoted(name) for name in same)} say different things"
        raise place.child(alias.name).error(trouble, "They are spellings of one key: give one of them.")
    inside[key.name] = value


# ----------------------------------------------------------------------------------------------------- the whole of it


def _assemble(layers: list[Layer], compute: str, environ: Mapping[str, str]) -> BackendConfig:
    """Merge the layers, the first on top, and build what comes out."""

    def place_of(key: str) -> Place:
        """Where a key is said: in the first layer that says it."""
        return next((place for place, layer in layers if layer.get(key) is not None), layers[0][0]).child(key)

    said: dict[str, Any] = {}
    for _, layer in reversed(layers):
        said = merged(said, layer)
    values = KEYS.build({**said, "compute": compute}, layers[0][0])
    if auth := values.pop("docker_auth", None):
        values["docker"] = dataclasses.replace(values.get("docker", DockerOptions()), auth=auth)
    limits = {name: values.pop(name) for name in list(values) if name in Limits.__dataclass_fields__}
    values["pass_env"] = _passed(values.get("pass_env", ()), environ, place_of("pass_env"))
    config = BackendConfig(**values, limits=Limits(**limits), extensions=said["extensions"])
    _check_together(config, place_of)
    return _with_kube_tracking_uri(config, environ, layers[0][0])


def _passed(names: Iterable[str], environ: Mapping[str, str], place: Place) -> Mapping[str, str]:
    missing = [name for name in names if name not in environ]
    if missing:
        trouble = f"names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not set here"
        raise place.error(trouble, "Export the variable where you submit, or remove its name.")
    return Masked({name: environ[name] for name in names})


def _check_together(config: BackendConfig, place_of: Callable[[str], Place]) -> None:
    """What no key can tell alone."""
    if config.snapshot.in_place and config.compute != "local":
        trouble = f"is for the compute local only; this run goes to {config.compute}"
        raise place_of("snapshot").child("in_place").error(trouble, "Remove it: elsewhere a job runs in a snapshot.")
    sources = {"env_vars": config.env_vars, "pass_env": config.pass_env, "secrets": config.secrets}
    for first, second in (("env_vars", "pass_env"), ("env_vars", "secrets"), ("pass_env", "secrets")):
        for name in sources[first]:
            if name in sources[second]:
                raise place_of(second).error(f"sets {name}, and so does {quoted(first)}", "Remove one of them.")


def _with_kube_tracking_uri(config: BackendConfig, environ: Mapping[str, str], place: Place) -> BackendConfig:
    """``KUBE_MLFLOW_TRACKING_URI`` names the server as a cluster sees it: of no use to a process of this machine."""
    uri = environ.get("KUBE_MLFLOW_TRACKING_URI")
    if not uri or config.tracking_uri or config.compute == "local":
        return config
    where = dataclasses.replace(place, origin="the environment variable KUBE_MLFLOW_TRACKING_URI")
    return dataclasses.replace(config, tracking_uri=ALL_KEYS["tracking_uri"].kind.read(uri, where))


def _with_command_line(config: BackendConfig, cli: CliContext, place: Place) -> BackendConfig:
    for key, option in (("run_id", "--run-id"), ("run_name", "--run-name")):
        told, said = getattr(cli, key), getattr(config, key)
        if told is None:
            continue
        if said not in (None, told):
            trouble = f"and the option {option} of the mlflow command say different things"
            raise place.child(key).error(trouble, "Give one of them.")
        where = dataclasses.replace(place, origin=f"the option {option}")
        config = dataclasses.replace(config, **{key: ALL_KEYS[key].kind.read(told, where)})
    return config


# ------------------------------------------------------------------------------------------------------ named computes


def _candidates(project_dir: Path | None, environ: Mapping[str, str], home: Path) -> list[Path]:
    """Where named computes may stand; the first file that defines one wins."""
    configured = environ.get("XDG_CONFIG_HOME", "")
    folder = Path(configured) if os.path.isabs(configured) else home / ".config"
    found = [] if project_dir is None else [Path(os.path.abspath(project_dir)) / FILE_NAME]
    found.append(folder / "mlflow-remote" / FILE_NAME)
    if pointed := environ.get("MLFLOW_REMOTE_CONFIG"):
        found.append(Path(os.path.abspath(pointed)))
    return found


def _named_computes(files: Iterable[Path], here: Place) -> dict[str, tuple[Path, Any]]:
    """Each named compute and the file that defines it, its keys not checked yet. All files that exist must be sound."""
    named: dict[str, tuple[Path, Any]] = {}
    for path in files:
        if os.path.lexists(path):
            for name, section in _computes_in(path, here).items():
                named.setdefault(name, (path, section))
    return named


def _computes_in(path: Path, here: Place) -> dict[str, Any]:
    place = dataclasses.replace(here, origin=str(path), base=path.parent)
    content = read_yaml(path)
    if content is None:
        return {}
    shape = '"computes" and under it named computes with their keys'
    if not isinstance(content, Mapping):
        raise place.refused(content, f"a mapping: {shape}")
    for key in content:
        if key != "computes":
            raise place.child(key).error("is not a key here", f"The file holds {shape}.")
    anything = Kind(name="compute", takes=("mapping", "list", "string", "number", "boolean"))
    found: dict[str, Any] = map_of(anything, COMPUTE_NAME).read(content["computes"] or {}, place.child("computes"))
    for name in COMPUTES:
        if name in found:
            raise place.child(f"computes.{name}").error("takes the name of a built-in compute", "Choose another name.")
    return found


def _named_layer(name: str, path: Path, section: Any, here: Place) -> Layer:
    place = dataclasses.replace(here, origin=f"compute {quoted(name)} in {path}", base=path.parent)
    if not isinstance(section, Mapping):
        raise place.refused(section, "a mapping with keys of backend_config")
    said = _read(section, place)
    compute = said.get("compute")
    kinds = f"{', '.join(COMPUTES)} or an installed compute"
    if compute is None:
        raise place.error("does not say where it runs", f'Add the key "compute": {kinds}.')
    if compute not in COMPUTES and compute not in installed_computes():
        raise place.child("compute").refused(compute, kinds, "A named compute cannot build on another one.")
    for key in KEYS.keys:
        if key.per_run and said.get(key.name) is not None:
            raise place.child(key.name).error("belongs to a single run", "Give it in backend_config instead.")
    return place, said


# -------------------------------------------------------------------------------------------------------- did you mean


def _unknown_compute(name: str, named: Iterable[str], files: list[Path], place: Place) -> ConfigError:
    known = [*COMPUTES, *sorted(installed_computes()), *named]
    looked = ", ".join(f"{path}{'' if path.exists() else ' (does not exist)'}" for path in files)
    hint = f"Known: {', '.join(known)}. Named computes were looked for in {looked}."
    guess = _did_you_mean(_nearest(name, known))
    return place.child("compute").error(f"is {quoted(name)}, which is no known compute", f"{guess} {hint}".strip())


def _unknown_key(unknown: UnknownKey) -> ConfigError:
    """Nearest first: the same letters in this section, then the same name in another one, then similar letters."""
    section, _, name = unknown.place.key.rpartition(".")
    here = [*unknown.siblings, *(a.name.rpartition(".")[2] for a in ALIASES if a.name.rpartition(".")[0] == section)]
    near = _nearest(name, here)
    same_letters = [known for known in near if _bare(known) == _bare(name)]
    elsewhere = [dotted for dotted in ALL_KEYS if _bare(dotted.rpartition(".")[2]) == _bare(name)]
    prefix = f"{section}." if section else ""
    guesses = [prefix + known for known in same_letters] or elsewhere or [prefix + known for known in near]
    hint = _did_you_mean(guesses) or f"Known here: {', '.join(unknown.siblings)}."
    if unknown.place.key in ALL_KEYS:  # written with a dot, as the documentation names it
        nested = "…"
        for each in reversed(unknown.place.key.split(".")):
            nested = f"{{{quoted(each)}: {nested}}}"
        hint = f"Write {nested}."
    return unknown.place.error("is not a key", hint)


def _did_you_mean(guesses: Iterable[str]) -> str:
    words = " or ".join(quoted(guess) for guess in guesses)
    return f"Did you mean {words}?" if words else ""


def _bare(name: str) -> str:
    """A name without what spellings differ in: case, dashes, underscores, blanks."""
    return re.sub("[-_ ]", "", name).lower()


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known name that is nearest, if one is near. Keys come before aliases, so they win at equal letters."""
    import difflib

    by_bare: dict[str, str] = {}
    for one in known:
        by_bare.setdefault(_bare(one), one)
    return [by_bare[bare] for bare in difflib.get_close_matches(_bare(name), by_bare, n=1, cutoff=0.7)]
