"""Verbs and their settings: `prism-ray VERB [key=value ...]`. The only package that knows Hydra.

Everything heavy is imported inside the verb that needs it, after the settings were checked, so that help and a refused
setting answer at once.
"""

import os
import sys
from collections.abc import Callable, Sequence

from prism_ray import __version__
from prism_ray.cli.compose import compose, compose_suite
from prism_ray.cli.files import GROUPS, group_names
from prism_ray.cli.folders import config_of_run, is_folder
from prism_ray.cli.keys import nearest
from prism_ray.config import Row
from prism_ray.errors import ExitCode, InputError, printable
from prism_ray.signals import ends_in_order

__all__ = ["compose", "compose_suite", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code and prints errors as one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return ExitCode.done
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return ExitCode.done
    return ends_in_order(lambda: _checked_verb(arguments))


def _checked_verb(arguments: list[str]) -> ExitCode:
    _check_text(arguments)
    return _run_verb(arguments[0], arguments[1:])


def _check_text(arguments: list[str]) -> None:
    """Refuse paths that Python could not decode: readers of parquet and JSON take text."""
    for text in (*arguments, os.getcwd()):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(
                f"{text!a}: no text in this locale ({sys.getfilesystemencoding()}); set PYTHONUTF8=1, or LC_ALL to "
                "a UTF-8 locale such as C.UTF-8"
            )


def _run_verb(verb: str, overrides: list[str]) -> ExitCode:
    if verb not in VERBS:
        raise InputError(f"{verb!r}: unknown verb{nearest(verb, VERBS)}; known: {', '.join(VERBS)}")
    function, _ = VERBS[verb]
    if any(argument in ("-h", "--help") for argument in overrides):
        print(help_text())
        return ExitCode.done
    return function(overrides)


EXAMPLES = (
    "prism-ray run recipe=digits method=prism            try it: data, teachers, images, labels, students, report",
    "prism-ray show recipe=digits method=prism           look at the images of that run",
    "prism-ray init dataset.path=/data/birds             write birds.yaml for photos of your own, then",
    "prism-ray run recipe=birds.yaml                     make a small set that stands for them",
    "prism-ray plan recipe=birds.yaml method.iterations=2000    what would it cost; starts nothing",
    "prism-ray bench suite=digits                        several methods side by side",
    "prism-ray config method.iterations                  what a setting means",
)


def help_text() -> str:
    """What `prism-ray --help` prints."""
    lines = [f"prism-ray {__version__}: makes training sets out of models", "", "  prism-ray VERB [key=value ...]", ""]
    lines += [f"  {verb:8} {text}" for verb, (_, text) in VERBS.items()]
    lines.append("")
    lines += [f"  {group}={'|'.join(group_names(group))}" for group in (*GROUPS, "suite")]
    lines += ["", "Examples", *(f"  {example}" for example in EXAMPLES)]
    lines += [
        "",
        "  `prism-ray config` lists every key: method.iterations=500 student.seeds=[0,1] storage=DIR",
        "  The same command, run again, continues. Exit codes: 0 done, 1 failure, 2 bad input, 3 done but units",
        "  quarantined, 75 stopped by SIGTERM (run again to continue), 130 interrupted.",
    ]
    return "\n".join(lines)


def _run(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import pipeline

    return pipeline.run(
        [Row(config.method.name, config)],
        title=f"{config.recipe_name}: {config.method.name}",
        command=_command("run", overrides),
    )


def _bench(overrides: list[str]) -> ExitCode:
    suite, rows = compose_suite(overrides)
    from prism_ray import pipeline

    return pipeline.run(
        rows,
        title=f"suite {suite.name}",
        command=_command("bench", overrides),
        suite=suite.name,
        references=suite.references,
    )


def _plan(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    print(printable(inspection.plan_text(config)))
    return ExitCode.done


def _status(overrides: list[str]) -> ExitCode:
    if any(override.startswith("suite=") for override in overrides):
        suite, rows = compose_suite(overrides)
        from prism_ray import status

        print(printable(status.suite_status_text(f"suite {suite.name}", rows, overrides)))
        return ExitCode.done
    config = compose(overrides)
    from prism_ray import status

    print(printable(status.status_text(config, overrides)))
    return ExitCode.done


def _verify(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    problems = inspection.verify(config)
    for problem in problems:
        print(printable(f"{problem['key']}: {problem['problem']}"))
    if not problems:
        print(f"{inspection.describe(config)}: every object matches its receipt")
        return ExitCode.done
    mendable = [problem for problem in problems if problem.get("stage")]
    print(
        f"{inspection.describe(config)}: {len(problems)} damaged; `prism-ray run` with the same settings makes "
        f"{len(mendable)} of them again"
    )
    if not (config.repair and mendable):
        return ExitCode.failure
    code = _run([o for o in overrides if not o.startswith("repair=")])
    return code if len(mendable) == len(problems) else ExitCode.failure


def _retry(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    count = inspection.retry(config)
    print(f"{inspection.describe(config)}: {count} quarantined units may be tried again")
    return _run(overrides)


def _report(arguments: list[str]) -> ExitCode:
    folders = [argument for argument in arguments if is_folder(argument)]
    command = _command("report", arguments)
    if not folders:
        config = compose(arguments)
        from prism_ray import inspection

        print(inspection.rewrite_report(config, command=command))
        return ExitCode.done
    others = [argument for argument in arguments if argument not in folders]
    if any(not other.startswith("storage=") for other in others) or len(others) > 1:
        raise InputError(
            f"report: {others[-1]}: folders of runs have their settings with them; leave it out (storage=DIR alone "
            "says where the comparison is written)"
        )
    configs = [config_of_run(folder) for folder in folders]
    from prism_ray import inspection

    if len(configs) == 1 and not others:
        print(inspection.rewrite_report(configs[0], command=command))
    else:
        where = others[0].partition("=")[2] if others else configs[0].storage
        print(inspection.compare_runs(configs, storage=where, command=command))
    return ExitCode.done


def _show(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    print(printable(inspection.show(config)))
    return ExitCode.done


def _init(overrides: list[str]) -> ExitCode:
    from prism_ray.first_recipe import KEYS, first_recipe
    from prism_ray.storage import check_new_file, write_new_file

    given = {override.partition("=")[0] for override in overrides}
    unknown = [key for key in given if key not in KEYS]
    if unknown or "dataset.path" not in given:
        wrong = f"{unknown[0]!r} is none of its settings" if unknown else "dataset.path is missing"
        raise InputError(
            f"init: {wrong}; expected dataset.path=FOLDER with a folder for each class, and if wanted "
            f"{', '.join(key for key in KEYS if key != 'dataset.path')}; set others in the recipe that it writes"
        )
    config = compose(["dataset=image_folder", *overrides])
    if config.out is not None:
        check_new_file(config.out, suffix=".yaml")
    recipe = first_recipe(config, given=given)
    check_new_file(recipe.path, suffix=".yaml")
    write_new_file(recipe.path, recipe.text.encode())
    print(printable(recipe.summary))
    return ExitCode.done


def _export(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray.export import export

    products, note = export(config)
    for product in products:
        print(f"{product.format:12} {product.path}")
        print(f"{'':12} {product.line}")
    if note:
        print(note)
    return ExitCode.done


def _doctor(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray.doctor import doctor_text

    text, healthy = doctor_text(config)
    print(printable(text))
    return ExitCode.done if healthy else ExitCode.failure


def _config(overrides: list[str]) -> ExitCode:
    from prism_ray.cli.settings import settings_text

    print(settings_text(overrides))
    return ExitCode.done


def _command(verb: str, overrides: list[str]) -> str:
    return " ".join(["prism-ray", verb, *overrides])


VERBS: dict[str, tuple[Callable[[list[str]], ExitCode], str]] = {
    "init": (_init, "a recipe for your own folder of images: init dataset.path=/data/birds out=birds.yaml"),
    "run": (_run, "make a data set and all that belongs to it: run recipe=digits method=prism"),
    "bench": (_bench, "several methods under one protocol, one report: bench suite=digits"),
    "plan": (_plan, "units, images, bytes and operations of a run; starts nothing"),
    "status": (_status, "how far a run or a suite is, who works on it, and what to do next: status recipe=digits"),
    "verify": (_verify, "compare every object with its checksum (repair=true: make damaged ones again)"),
    "retry": (_retry, "try quarantined units again"),
    "report": (_report, "write a run's report again, or compare finished runs: report outputs/runs/A outputs/runs/B"),
    "show": (_show, "a contact sheet of a run's images as a PNG: show recipe=digits out=digits.png"),
    "export": (_export, "a run's images and students for other programs: export export.formats=[timm,onnx,hf]"),
    "config": (_config, "every setting with its meaning, unit, type, default and check: config method.guidance"),
    "doctor": (_doctor, "what this machine and this installation can do"),
}
