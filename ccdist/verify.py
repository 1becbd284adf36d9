"""python -m ccdist.verify MODEL: which images of a data set no allowed perturbation can make it misclassify.

In the folder of --out: `verification.json`, what is verified; `verdicts/`, rows as images get decided, and `state/`,
where a stopped verification goes on from, both while it runs; `verdicts.parquet`, a row for each image, its `index`
that in the split; `counterexamples.parquet`; `summary.json`, written last.

Exit codes: 0 it is done; 2 something asked for is wrong, or the system refuses it (a full disk); 130 stopped by Ctrl-C;
143 by a termination signal.
"""

import argparse
import json
import platform
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from ccdist import checkpoint, selection
from ccdist.atomic_files import write_table, write_text
from ccdist.command_line import (
    BAD_INPUT,
    OK,
    Parser,
    Terminated,
    chosen_device,
    failed,
    place,
    refused,
    stopped,
    terminable,
)
from ccdist.config import ATTACK_RUNGS, ThreatModel, VerifyConfig, fingerprint
from ccdist.host_memory import keep_freed_memory
from ccdist.provenance import source_commit
from ccdist.run_folders import RunFolderError, differing_keys, held
from ccdist.selection import Selection
from ccdist.train_progress import duration
from ccdist.verdict_store import VerdictStream, counterexample_table, in_split, is_whole
from ccdist.verdicts import ATTACKS, CounterExample
from ccdist.verification import Progress, Verdict, accuracies, check_rungs, verify
from ccdist.verify_progress import VerifyProgress
from ccdist.yaml_files import explain

LADDER = ("pgd", "ibp", "crown", "alpha_crown", "branch_and_bound")
DESCRIPTION, SUMMARY = "verification.json", "summary.json"
VERDICTS, COUNTEREXAMPLES = "verdicts.parquet", "counterexamples.parquet"
PARTS, STATE = "verdicts", "state"
# Where an option's value stands in the configuration.
OPTIONS = {
    r"branch_and_bound\.timeout_s": "--timeout",
    r"branch_and_bound\.total_timeout_s": "--total-timeout",
    r"branch_and_bound\.max_branches": "--max-branches",
    r"batch_size": "--batch-size",
    r"seed": "--seed",
    r"rungs(\.\d+)?": "--rungs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    try:
        args = _parser().parse_args(words)
        with terminable():
            return _verify(args, Console())
    except ValueError as error:  # what ccdist raises for a mistake of its user
        return refused(error, BAD_INPUT)
    except OSError as error:  # a full disk, a folder taken away
        return failed(error, _command(words))
    except (KeyboardInterrupt, Terminated) as stop:
        return stopped(stop, _command(words))


def _command(words: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "ccdist.verify", *words])


def _verify(args: argparse.Namespace, console: Console) -> int:
    device = chosen_device(args.device, args.threads)
    chosen = selection.load(args)
    config = _config(args, chosen.threat)
    about = _about(chosen, config)
    folder = Path(args.out) if args.out else chosen.model_path / "verification" / fingerprint(about)
    if not (folder / DESCRIPTION).exists():  # a refused ladder claims no folder
        check_rungs(chosen.network, chosen.images, chosen.labels, config)
    limit = config.branch_and_bound.total_timeout_s
    with held(folder, DESCRIPTION), VerifyProgress(console, total_timeout_s=limit) as progress:
        _check_kinds(folder)
        _check_owner(folder, about)
        summary = _finished_summary(folder, about, chosen.indices)
        if summary is not None:
            progress.note(f"{folder} is finished")
        else:
            summary = _run(folder, chosen, config, about, device, progress)
        for leftover in (PARTS, STATE):  # their rows are in the table now
            shutil.rmtree(folder / leftover, ignore_errors=True)
    told = f"{report(summary)}\nresults: {folder}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    return OK


def _config(args: argparse.Namespace, threat: ThreatModel) -> VerifyConfig:
    rungs = [rung for word in args.rungs for rung in word.split(",") if rung]
    if not rungs:
        raise ValueError(f"--rungs names no rung; expected some of {' '.join(LADDER)}")
    if args.ensemble and "ensemble" not in rungs:
        rungs.insert(rungs.index("pgd") + 1 if "pgd" in rungs else 0, "ensemble")
    limits = {"timeout_s": args.timeout, "total_timeout_s": args.total_timeout, "max_branches": args.max_branches}
    asked = {
        "threat": threat,
        "rungs": rungs,
        "branch_and_bound": {key: None if value == "none" else value for key, value in limits.items()},
        "batch_size": args.batch_size,
        "seed": args.seed,
    }
    try:
        return VerifyConfig.model_validate(asked)
    except ValidationError as error:
        raise ValueError(_by_option(explain(error, VerifyConfig))) from error


def _by_option(mistake: str) -> str:
    """A mistake in the configuration, told by the option that it came from."""
    for key, option in OPTIONS.items():
        mistake = re.sub(rf"^{key}: ", f"{option}: ", mistake)
    return mistake


def _about(chosen: Selection, config: VerifyConfig) -> dict[str, Any]:
    """What is verified, as JSON values: the identity of a folder."""
    return {
        "weights_sha256": checkpoint.weights_sha256(chosen.network),
        "data": chosen.data_name,
        "split": chosen.split,
        "images": [chosen.indices.start, chosen.indices.stop],
        "data_fingerprint": chosen.data_fingerprint,
        "verification": config.model_dump(mode="json"),
    }


def _check_kinds(folder: Path) -> None:
    """Refuse folders where files belong, and the other way around, before hours of work end there."""
    for name in (DESCRIPTION, SUMMARY, VERDICTS, COUNTEREXAMPLES):
        if (folder / name).is_dir():
            raise RunFolderError(f"{folder / name} is a folder, where a file belongs; delete or rename it")
    for name in (PARTS, STATE):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise RunFolderError(f"{folder / name} is a file, where a folder belongs; delete or rename it")


def _check_owner(folder: Path, about: dict[str, Any]) -> None:
    file = folder / DESCRIPTION
    if not file.exists():
        write_text(file, json.dumps(about, indent=1))
        return
    try:
        there = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{file} is damaged ({error}); delete {folder} to begin again") from error
    for key, before, asked in differing_keys(there, about):
        raise RunFolderError(
            f"{folder} holds another verification: there {key} is {before}, now it is {asked}; "
            "choose another folder with --out DIR, or delete that one"
        )


def _finished_summary(folder: Path, about: dict[str, Any], indices: range) -> dict[str, Any] | None:
    """None where the verification is not finished, or a part of what it left is damaged: that is made again."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        report(summary)
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return None
    whole = is_whole(folder / VERDICTS, folder / COUNTEREXAMPLES, indices) and summary["num_images"] == len(indices)
    return summary if whole and summary.items() >= about.items() else None


def _run(
    folder: Path,
    chosen: Selection,
    config: VerifyConfig,
    about: dict[str, Any],
    device: torch.device,
    progress: VerifyProgress,
) -> dict[str, Any]:
    """Verify, or go on with it; everything that the folder keeps is written here."""
    (folder / SUMMARY).unlink(missing_ok=True)  # of tables that are damaged
    stream = VerdictStream(folder / PARTS, chosen.indices)
    found: list[CounterExample] = []
    finished: dict[str, Progress] = {}
    resumed = (folder / STATE).exists()

    def going_on(decided: int) -> None:
        nonlocal resumed
        if resumed:
            progress.going_on(decided, len(chosen))
        resumed = False

    def on_rows(rows: pa.Table) -> None:
        going_on(rows.num_rows)  # those of the state come first, all at once
        stream.add(rows)

    def on_progress(each: Progress) -> None:
        going_on(0)
        finished[each.rung] = each  # the last one of a rung stays
        progress.progress(each)

    def on_counterexample(index: int, method: str, point: Tensor) -> None:
        found.append(CounterExample(chosen.indices[index], method, point))

    table = verify(
        chosen.network.to(device),
        chosen.images,
        chosen.labels,
        config,
        on_rung=progress.rung,
        on_progress=on_progress,
        on_counterexample=on_counterexample,
        on_rows=on_rows,
        state=folder / STATE,
    )
    write_table(folder / VERDICTS, in_split(table, chosen.indices))
    write_table(folder / COUNTEREXAMPLES, counterexample_table(found))
    measured = _measured(table, list(finished.values()), config) | {"worst_case": _worst_case(table, config)}
    summary = about | {"model": str(chosen.model_path)} | measured | _made_by(device)
    write_text(folder / SUMMARY, json.dumps(summary, indent=1))
    return summary


def _measured(table: pa.Table, finished: Sequence[Progress], config: VerifyConfig) -> dict[str, Any]:
    """Counts, accuracies and times of a finished verification; adversarial accuracy: None without an attack."""
    measured = accuracies(table)
    rows = list(zip(table["verdict"].to_pylist(), table["method"].to_pylist(), strict=True))
    verdicts = Counter(verdict for verdict, _ in rows)
    before = [replace(finished[0], proved=0, falsified=0), *finished[:-1]]
    seconds = sum(done.seconds for done in finished)
    return {
        "num_images": table.num_rows,
        "verdicts": {str(verdict): verdicts[str(verdict)] for verdict in Verdict},
        "methods": {
            str(verdict): dict(Counter(method for each, method in rows if each == verdict))
            for verdict in (Verdict.CERTIFIED, Verdict.FALSIFIED)
        },
        "rungs": [
            {
                "rung": done.rung,
                "images": done.entered,
                "proved": done.proved - earlier.proved,
                "falsified": done.falsified - earlier.falsified,
                "seconds": done.seconds,
            }
            for earlier, done in zip(before, finished, strict=True)
        ],
        "standard_accuracy": measured.standard,
        "adversarial_accuracy": measured.adversarial if _has_attack(config) else None,
        "certified_accuracy": measured.certified,
        "certified_upper": measured.certified_upper,
        "seconds": seconds,
        "images_per_second": table.num_rows / max(seconds, 1e-9),
    }


def _worst_case(table: pa.Table, config: VerifyConfig) -> dict[str, int]:
    """How many images each attack broke, in the order of running; each met only what those before it left."""
    asked = [("pgd", ATTACKS[:1]), ("ensemble", ATTACKS[1:])]
    names = ["clean", *(name for rung in config.rungs for key, names in asked if key == rung for name in names)]
    falsified = Counter(
        method
        for verdict, method in zip(table["verdict"].to_pylist(), table["method"].to_pylist(), strict=True)
        if verdict == Verdict.FALSIFIED
    )
    return {name: falsified[name] for name in names}


def _made_by(device: torch.device) -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pyarrow": pa.__version__},
        "commit": source_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def report(summary: dict[str, Any]) -> str:
    """A finished verification as a short table, and its accuracies."""
    config = VerifyConfig.model_validate(summary["verification"])
    count, verdicts = summary["num_images"], summary["verdicts"]
    lines = [f"{'rung':<18}{'images':>8}{'proved':>8}{'falsified':>11}{'seconds':>10}"]
    lines += [
        f"{each['rung']:<18}{each['images']:>8}{each['proved']:>8}{each['falsified']:>11}{each['seconds']:>10.1f}"
        for each in summary["rungs"]
    ]

    def share(name: str) -> str:
        return f"{round(summary[name] * count)}/{count} = {summary[name]:.4f}"

    adversarial = share("adversarial_accuracy") if _has_attack(config) else "not measured"
    lines += [
        (
            f"{summary['data']} {summary['split']}, images {summary['images'][0]} to {summary['images'][1] - 1}, "
            f"{config.threat}: {duration(summary['seconds'])}, {summary['images_per_second']:.3g} images/s"
        ),
        f"falsified by          {', '.join(f'{name} {broken}' for name, broken in summary['worst_case'].items())}",
        f"standard accuracy     {share('standard_accuracy')}",
        f"adversarial accuracy  {adversarial} ({_attacks(config)})",
        (
            f"certified accuracy    {share('certified_accuracy')}, at most {share('certified_upper')} "
            f"({verdicts['undecided']} undecided; {_limits(config)})"
        ),
    ]
    return "\n".join(lines)


def _has_attack(config: VerifyConfig) -> bool:
    return any(rung in ATTACK_RUNGS for rung in config.rungs)


def _attacks(config: VerifyConfig) -> str:
    attack, named = config.attack, []
    if "pgd" in config.rungs:
        named.append(f"PGD, {attack.steps} steps, restarts: {attack.restarts}")
    if "ensemble" in config.rungs:
        named.append("ensemble of APGD-CE, APGD-DLR, FAB and Square")
    return "; ".join(named) or "no attack"


def _limits(config: VerifyConfig) -> str:
    if "branch_and_bound" not in config.rungs:
        return "no branch and bound"
    limits, told = config.branch_and_bound, []
    if limits.timeout_s is not None:
        told.append(f"{limits.timeout_s:g} s an image")
    if limits.total_timeout_s is not None:
        told.append(f"{limits.total_timeout_s:g} s for all")
    if limits.max_branches is not None:
        told.append(f"{limits.max_branches} branches an image")
    return f"limit: {', '.join(told)}" if told else "no limit"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m ccdist.verify",
        description="Verify a stored network on images of a data set. The same command again goes on with a "
        "verification that was stopped.",
    )
    selection.add_arguments(parser)
    parser.add_argument(
        "--rungs", metavar="RUNG", nargs="+", default=LADDER, help=f"after the clean prediction: {' '.join(LADDER)}"
    )
    parser.add_argument("--ensemble", action="store_true", help="the attack ensemble as a rung after pgd")
    parser.add_argument(
        "--timeout", metavar="S", default="20", help="of branch and bound for one image (default: 20), or none"
    )
    parser.add_argument("--total-timeout", metavar="S", default="none", help="of branch and bound for all images")
    parser.add_argument("--max-branches", metavar="N", default="none", help="sub-problems of one image")
    parser.add_argument(
        "--batch-size", metavar="N", default="256", help="images at once (default: 256; the ensemble takes 32 at most)"
    )
    parser.add_argument("--seed", metavar="N", default="0", help="of the attacks' random starts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--out", metavar="DIR", type=place, help="where everything goes (default: MODEL/verification/HASH)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
