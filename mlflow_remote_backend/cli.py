"""The ``mlflow-remote`` command: parse, call, print; no logic.

Exit status: 0 finished (or answered), 1 failed, 2 a wrong request, 3 contact lost or detached and the run goes on,
130 cancelled by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Detached, RemoteError, RequestError, ServiceError
from .version import __version__

if TYPE_CHECKING:
    from .submitted_run import RemoteSubmittedRun
    from .tracking import RunView, Tracking

OK, FAILED, WRONG_REQUEST, RUN_GOES_ON, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = parser().parse_args(argv)
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # names, messages and logs have characters that not every terminal has
    try:
        code: int = arguments.verb(arguments)
        sys.stdout.flush()
        return code
    except RequestError as error:
        return _complain(error, WRONG_REQUEST)
    except (ServiceError, Detached) as error:
        return _complain(error, RUN_GOES_ON)
    except RemoteError as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return OK


def _complain(error: RemoteError, code: int) -> int:
    print(f"mlflow-remote: {error}", file=sys.stderr)
    return code


# -- the grammar -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="mlflow-remote", description="Look after runs of the MLflow backend 'remote'.")
    root.add_argument("--version", action="version", version=f"mlflow-remote-backend {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON for programs")
    common.add_argument("--tracking-uri", help="default: what MLflow is configured with")
    verbs = root.add_subparsers(metavar="VERB", required=True)

    def verb(
        name: str, action: Callable[[argparse.Namespace], int], summary: str, run: bool = True, metavar: str = "RUN"
    ) -> Any:
        added = verbs.add_parser(name, parents=[common], help=summary, description=summary)
        added.set_defaults(verb=action)
        if run:
            either = "" if metavar == "RUN" else "; or a deployment's name (deployment/NAME where it looks like an id)"
            added.add_argument("run", metavar=metavar, help="a run id, or a unique start of one" + either)
        return added

    _add_plan(verb("plan", _plan, "say what mlflow run --backend remote would do, and do nothing", run=False))
    verb("status", _status, "one line: where the run is")
    logs = verb("logs", _logs, "the program's or the server's output", metavar="RUN|NAME")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    logs.add_argument("--tail", type=int, metavar="N", help="only the last N lines")
    verb("attach", _attach, "follow the run as its submitter does; Ctrl-C cancels it, twice detaches")
    verb("cancel", _cancel, "stop the run and wait until it has stopped")
    verb("describe", _describe, "all that is known of the run or the deployment", metavar="RUN|NAME")
    listing = verb("ls", _ls, "the runs of this backend, newest first, and the deployments", run=False)
    listing.add_argument("-n", type=int, default=20, metavar="N", help="how many (20)")
    listing.add_argument("--running", action="store_true", help="only runs that have not ended")
    gc = verb("gc", _gc, "end what died half-way and remove what it left", run=False)
    gc.add_argument("--dry-run", action="store_true", help="only say what would be done")
    gc.add_argument("--cache", action="store_true", help="remove cached environments as well")
    verb("doctor", _doctor, "what works from this machine", run=False)
    verb("schema", _schema, "the JSON Schema of backend_config", run=False)
    register = verb("register", _register, "make the run's model a version of a registered model")
    register.add_argument("name", metavar="NAME")
    register.add_argument("--path", default="model", help="the model's name or artifact path in the run (model)")
    lock = verb("lock", _lock, "solve the project's environment anew and write its lock file", run=False)
    lock.add_argument("project", metavar="PROJECT", help="the project's folder")
    lock.add_argument("--platform", action="append", metavar="NAME", help="linux-64 (default), linux-aarch64, …")
    lock.add_argument("-c", "--backend-config", metavar="FILE", help="a .json file, or JSON")
    _add_env(verbs.add_parser("env", help="the environments cached on this machine"), common)
    _add_image(verbs.add_parser("image", help="the image that runs our part of a job on Kubernetes"), common)
    return root


def _add_env(env: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = env.add_subparsers(metavar="ACTION", required=True)
    actions.add_parser("ls", parents=[common], help="list them").set_defaults(verb=_env_ls)
    prune = actions.add_parser("prune", parents=[common], help="remove those that nobody used for a while")
    prune.add_argument("--older-than", default="30d", metavar="DURATION", help="unused for that long (30d)")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    prune.set_defaults(verb=_env_prune)


def _add_image(image: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = image.add_subparsers(metavar="ACTION", required=True)
    build = actions.add_parser("build", parents=[common], help="build it from a base image that has Python")
    build.add_argument("--base", metavar="IMAGE", help="the image to build on")
    build.add_argument("--push", default="", metavar="REPOSITORY", help="push it there and print its digest")
    build.add_argument(
        "--with",
        dest="packages",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="what else it holds, as for pip, such as boto3 for artifacts in S3 (may be repeated)",
    )
    build.set_defaults(verb=_image_build)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("uri", metavar="URI", help="a folder, a git URL or a zip file, as for mlflow run")
    plan.add_argument("-e", "--entry-point", default="main")
    plan.add_argument("-v", "--version", dest="project_version")
    plan.add_argument("-P", "--param-list", action="append", default=[], metavar="NAME=VALUE")
    plan.add_argument("-c", "--backend-config", metavar="FILE", help="a .json file, or JSON")
    plan.add_argument("--env-manager")
    plan.add_argument("--experiment-id", default="0")


# -- the verbs ---------------------------------------------------------------------------------------------------------


def _tracking(arguments: argparse.Namespace) -> Tracking:
    import mlflow

    from .tracking import Tracking

    return Tracking(arguments.tracking_uri or mlflow.get_tracking_uri())


def _run(arguments: argparse.Namespace) -> RemoteSubmittedRun:
    from .submitted_run import attach

    return attach(arguments.run, tracking_uri=arguments.tracking_uri)


def _print(arguments: argparse.Namespace, data: Any, text: Callable[[], str]) -> None:
    print(json.dumps(data, indent=2, default=str) if arguments.json else text())


def _plan(arguments: argparse.Namespace) -> int:
    from . import submission
    from .backend import plan

    config = _as_mapping(arguments.backend_config)
    if arguments.env_manager:
        config = {**config, "env_manager": arguments.env_manager}
    planned = plan(
        arguments.uri,
        arguments.entry_point,
        parameters=_parameters(arguments.param_list),
        version=arguments.project_version,
        backend_config=config,
        tracking_uri=arguments.tracking_uri,
        experiment_id=arguments.experiment_id,
    )
    _print(arguments, submission.plan_data(planned), lambda: submission.plan_text(planned))
    return OK


def _as_mapping(config: str | None) -> dict[str, Any]:
    if not config:
        return {}
    try:
        if config.endswith(".json"):
            with open(config, encoding="utf-8") as file:
                return dict(json.load(file))
        return dict(json.loads(config))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"--backend-config {config!r} is not a JSON object.", words=str(error)) from error


def _parameters(pairs: Sequence[str]) -> dict[str, str]:
    parameters = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"-P {pair!r} is not NAME=VALUE.")
        if name in parameters:
            raise RequestError(f"Parameter {name!r} is given twice.")
        parameters[name] = value
    return parameters


def _status(arguments: argparse.Namespace) -> int:
    from .submitted_run import details

    view = _run(arguments).view()
    _print(arguments, details(view), lambda: _line(view))
    return FAILED if view.ended and view.status != "FINISHED" else OK


def _line(view: RunView) -> str:
    from .display import harmless

    state = view.status if view.ended else view.tag("phase") or view.status
    words = " ".join(
        filter(None, (view.tag("reason") if view.ended else "", view.tag("message") if view.ended else ""))
    )
    name = harmless(view.name)[:24]
    return harmless(f"{view.run_id[:12]}  {state:<10}  {view.tag('compute'):<12}  {name:<24}  {words}".rstrip())


def _logs(arguments: argparse.Namespace) -> int:
    from .deployment import looking
    from .display import Terminal, harmless
    from .submitted_run import last_lines

    if name := looking.name_in(arguments.run):
        terminal = Terminal(sys.stdout)
        for data in looking.logs(name, follow=arguments.follow, tail=arguments.tail):
            terminal.write(data)
        terminal.end()
        return OK
    run = _run(arguments)
    if arguments.tail is not None and not arguments.follow:
        for line in last_lines(run._tracking, run.run_id, arguments.tail):
            print(harmless(line))
        return OK
    terminal = Terminal(sys.stdout)
    for data in run.log_bytes(arguments.follow, tail=arguments.tail):
        terminal.write(data)
    terminal.end()
    return OK


def _attach(arguments: argparse.Namespace) -> int:
    from .follow import stderr_line

    run = _run(arguments)
    view = run.follow(sys.stdout)
    stderr_line(_line(view))
    if run.cancelled_here:
        return INTERRUPTED
    return OK if view.status == "FINISHED" else FAILED


def _cancel(arguments: argparse.Namespace) -> int:
    run = _run(arguments)
    run.cancel()
    view = run.view()
    from .submitted_run import details

    _print(arguments, details(view), lambda: _line(view))
    return OK if view.ended else RUN_GOES_ON


def _describe(arguments: argparse.Namespace) -> int:
    from .deployment import looking
    from .submitted_run import details

    name = looking.name_in(arguments.run)
    found = looking.details(name) if name else details(_run(arguments).view())
    _print(arguments, found, lambda: _table(found))
    return OK


def _table(found: dict[str, Any]) -> str:
    from .display import harmless

    lines = []
    for key, value in found.items():
        if key in ("started", "ended", "created", "updated") and value:
            value = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        if isinstance(value, dict):
            lines += [f"{key:<14} {name} = {_rounded(each)}" for name, each in sorted(value.items())]
        elif value not in ("", None, []):
            lines.append(f"{key:<14} {value}")
    return "\n".join(map(harmless, lines))


def _rounded(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _ls(arguments: argparse.Namespace) -> int:
    from .deployment import looking
    from .follow import stderr_line
    from .submitted_run import details, looked_at

    tracking = _tracking(arguments)
    found = tracking.runs("attributes.status = 'RUNNING'" if arguments.running else "", limit=arguments.n)
    views = [looked_at(tracking, view) for view in found]
    views = [view for view in views if not (arguments.running and view.ended)]
    seen = looking.everywhere()
    deployed = seen.statuses
    for sentence in seen.unknown:
        stderr_line(sentence)
    data = [*(details(view) for view in views), *(looking.data(status) for status in deployed)]
    _print(arguments, data, lambda: "\n".join([*map(_line, views), *map(looking.line, deployed)]))
    return OK


def _gc(arguments: argparse.Namespace) -> int:
    import dataclasses

    from . import gc

    done = list(gc.failures(gc.collect(_tracking(arguments), dry_run=arguments.dry_run, cache=arguments.cache)))
    data = [dataclasses.asdict(each) for each in done]
    _print(
        arguments,
        data,
        lambda: "\n".join(f"{each.kind} {each.what}: {each.action}" for each in done) or "nothing to do",
    )
    return RUN_GOES_ON if any(each.kind == "error" for each in done) else OK


def _doctor(arguments: argparse.Namespace) -> int:
    import dataclasses

    from . import doctor

    findings = list(doctor.examine(_tracking(arguments).uri))
    data = [dataclasses.asdict(each) for each in findings]
    _print(arguments, data, lambda: "\n".join(f"{each.state:<8} {each.name:<16} {each.detail}" for each in findings))
    return FAILED if any(each.state == "broken" for each in findings) else OK


def _schema(arguments: argparse.Namespace) -> int:
    from .config import schema

    print(json.dumps(schema(), indent=2))
    return OK


def _register(arguments: argparse.Namespace) -> int:
    version = _run(arguments).register_model(arguments.name, arguments.path)
    data = {"name": version.name, "version": version.version}
    _print(arguments, data, lambda: f"{version.name} version {version.version}")
    return OK


def _lock(arguments: argparse.Namespace) -> int:
    from . import submission
    from .follow import stderr_line

    platforms = arguments.platform or ["linux-64"]
    path = submission.write_lock(arguments.project, _as_mapping(arguments.backend_config), platforms, stderr_line)
    _print(arguments, {"lock": str(path)}, lambda: str(path))
    return OK


def _env_ls(arguments: argparse.Namespace) -> int:
    import dataclasses

    from .environment import cache

    found = cache.entries(cache.default_root())
    _print(
        arguments,
        [dataclasses.asdict(each) for each in found],
        lambda: "\n".join(f"{each.lock_key[:20]}  {each.size_bytes / 1e6:>9.1f} MB  {_use(each)}" for each in found),
    )
    return OK


def _use(entry: Any) -> str:
    import datetime

    when = datetime.datetime.fromtimestamp(entry.last_used).isoformat(" ", "minutes")
    return "in use" if entry.in_use else f"last used {when}" if entry.complete else "unfinished"


def _env_prune(arguments: argparse.Namespace) -> int:
    import dataclasses

    from .config.kinds import DURATION, Place
    from .environment import cache

    older_than_s = float(DURATION.read(arguments.older_than, Place("--older-than", Path(), Path())))
    done = cache.prune(cache.default_root(), older_than_s, dry_run=arguments.dry_run)
    verb = "would free" if arguments.dry_run else "freed"
    text = f"{verb} {done.bytes / 1e6:.1f} MB: {len(done.environments)} environments, {done.files} other files"
    _print(arguments, dataclasses.asdict(done), lambda: text)
    return OK


def _image_build(arguments: argparse.Namespace) -> int:
    import dataclasses

    from .follow import stderr_line
    from .runner import image

    base = arguments.base or image.DEFAULT_BASE
    built = image.build(base, arguments.push, packages=arguments.packages, say=stderr_line)
    _print(arguments, dataclasses.asdict(built), lambda: built.digest or built.tag)
    return OK


if __name__ == "__main__":
    sys.exit(main())
