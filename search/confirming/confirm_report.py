"""The result of a confirmation as a table: for the terminal, as Markdown, as LaTeX, and as JSON.

Everything is a function of a `Result`, so the same database gives the same bytes. Every form says how many test images
there were, of which data, under which threat, by which verifier with which limit, and over how many seeds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ccdist import atomic_files
from search.confirming.confirmation import SEED
from search.confirming.confirmed import Confirmed, Result, Spread
from search.results.report_text import ABSENT, images_text, parameters_text

FILES = ("confirm.json", "confirm.md", "confirm.tex")
SPREAD = "mean (lowest to highest over the seeds)"


class Row(NamedTuple):
    """One member as text."""

    member: str
    seeds: str
    standard: str
    adversarial: str
    certified: str
    gap_standard: str
    gap_certified: str
    gap_alike: str
    note: str


HEADER = Row(
    "member", "seeds", "standard", "adversarial", "certified", "gap standard", "gap certified", "same rungs", "note"
)
LISTED = 2  # more members that dominate one are counted, not listed


def rows(result: Result) -> list[Row]:
    """The members, best standard accuracy first."""
    return [_row(result, member) for member in result.members]


def _row(result: Result, member: Confirmed) -> Row:
    return Row(
        member.key,
        str(member.num_seeds),
        spread_text(member.standard),
        spread_text(member.adversarial),
        certified_text(member),
        _gap_text(member.gap and member.gap[0]),
        _gap_text(member.gap and member.gap[1]),
        _gap_text(member.gap_alike),
        note(result, member),
    )


def _gap_text(gap: float | None) -> str:
    return ABSENT if gap is None else f"{round(gap, 4) + 0.0:+.4f}"  # never -0.0000


def note(result: Result, member: Confirmed) -> str:
    """What the member is best at, who dominates it, and which of its runs failed."""
    parts = result.roles_of(member.key)
    if member.dominated_by:
        more = len(member.dominated_by) - LISTED
        others = f" and {more} more" if more > 0 else ""
        parts.append(f"dominated by {', '.join(member.dominated_by[:LISTED])}{others}")
    parts += [f"seed {run.params[SEED]} failed: {run.reason}" for run in member.failed]
    return "; ".join(parts)


def spread_text(spread: Spread | None) -> str:
    if spread is None:
        return ABSENT
    if len(spread.values) == 1:
        return f"{spread.mean:.4f}"
    return f"{spread.mean:.4f} ({spread.lowest:.4f} to {spread.highest:.4f})"


def certified_text(member: Confirmed) -> str:
    """The lower end, and the mean of the upper ends where images were left undecided."""
    lower, upper = member.certified, member.certified_upper
    text = spread_text(lower)
    if lower is not None and upper is not None and upper.mean > lower.mean:
        text += f", at most {upper.mean:.4f}"
    return text


def setting(result: Result) -> str:
    """What the numbers are about."""
    record, counts = result.record, sorted({member.num_seeds for member in result.members})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    noun = "seed" if seeds == "1" else "seeds"
    return (
        f"{images_text(record)} of {record.dataset}; threat: {record.threat}; verifier: "
        f"{record.verifier}; {SPREAD}, {seeds} {noun}, each trained anew on the training and validation images."
    )


def explanation(result: Result) -> str:
    """What the columns mean."""
    return (
        f"Certified: the proved share. Gap: result of the search {result.searched.name} on its validation images minus "
        "test mean; same rungs: counting only what rungs of the search's own ladder proved of the test images. "
        f"That ladder: {result.searched.verifier}. Dominated, best and knee: by the means of standard and certified "
        "accuracy."
    )


# ---- Forms -----------------------------------------------------------------------------------------------------


def terminal_table(result: Result) -> Group:
    """Two tables that fit a narrow terminal: the accuracies, and how they compare."""
    heading = f"{result.record.name}: {len(result.front)} of {len(result.members)} members on the confirmed front"
    accuracies = [
        (row.member, row.seeds, *map(_folded, (row.standard, row.adversarial, row.certified))) for row in rows(result)
    ]
    comparison = [(row.member, row.gap_standard, row.gap_certified, row.gap_alike, row.note) for row in rows(result)]
    return Group(
        Text(heading, style="bold"),
        Text(),
        _terminal_table((*HEADER[:5],), accuracies),
        Text(),
        _terminal_table((HEADER[0], *HEADER[5:]), comparison),
        Text(),
        Text(_caption(result), style="dim"),
    )


def _terminal_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(Text(name), justify="left" if name in ("member", "note") else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _folded(cell: str) -> str:
    """Spread and upper end below the mean."""
    return cell.replace(" (", "\n").replace(")", "").replace(", at most", "\nat most")


def markdown(result: Result) -> str:
    lines = [
        f"# {result.record.name}",
        "",
        _markdown_row(HEADER),
        "|---|" + "---:|" * (len(HEADER) - 2) + "---|",
        *(_markdown_row(row) for row in rows(result)),
        "",
        setting(result),
        "",
        explanation(result),
        "",
        *(f"- {member.key}: {parameters_text(member.member.params)}" for member in result.members),
        "",
    ]
    return "\n".join(lines)


def latex(result: Result) -> str:
    """A table that needs the package booktabs and nothing else."""
    body = [
        " & ".join(_tex_cells(row, member, result.roles_of(member.key))) + r" \\"
        for row, member in zip(rows(result), result.members, strict=True)
    ]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            r"\small",
            rf"\caption{{{tex_escaped(_caption(result))}}}",
            r"\begin{tabular}{l" + "r" * (len(HEADER) - 2) + "l}",
            r"\toprule",
            " & ".join(tex_escaped(name) for name in HEADER) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _tex_cells(row: Row, member: Confirmed, roles: Sequence[str]) -> list[str]:
    """The row in the space of a paper's column: dashes for ranges, and of dominated members only that they are."""
    numbers = [tex_escaped(cell).replace(" to ", "--") for cell in row[1:-1]]
    numbers = [f"${cell[0]}${cell[1:]}" if cell[0] in "+-" and len(cell) > 1 else cell for cell in numbers]
    failed = [f"seed {run.params[SEED]} failed" for run in member.failed]
    notes = [*roles, *(["dominated"] if member.dominated_by else []), *failed]
    return [tex_escaped(row.member), *numbers, tex_escaped("; ".join(notes))]


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
}


def tex_escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def as_json(result: Result) -> dict[str, Any]:
    """The whole result as plain values."""
    record = result.record
    return {
        "confirmation": record.name,
        "study": result.searched.name,
        "dataset": record.dataset,
        "split": record.split,
        "num_images": record.num_images,
        "threat": record.threat,
        "verifier": record.verifier,
        "spread": "lowest and highest of the seeds; sd: standard deviation of the sample",
        "front": [member.key for member in result.front],
        "roles": result.roles,
        "members": [_member_json(result, member) for member in result.members],
    }


def _member_json(result: Result, member: Confirmed) -> dict[str, Any]:
    return {
        "member": member.key,
        "configuration": member.member.configuration,
        "params": member.member.params,
        "num_seeds": member.num_seeds,
        "standard_accuracy": _spread_json(member.standard),
        "adversarial_accuracy": _spread_json(member.adversarial),
        "certified_accuracy": _spread_json(member.certified),
        "certified_upper": _spread_json(member.certified_upper),
        "gap": None if member.gap is None else dict(zip(("standard", "certified"), member.gap, strict=True)),
        "gap_same_rungs": member.gap_alike,
        "on_front": member.is_on_front,
        "dominated_by": list(member.dominated_by),
        "roles": result.roles_of(member.key),
        "runs": [{"key": run.key, "seed_index": run.params[SEED], "seed": run.seed} for run in member.runs],
        "failed": [{"key": run.key, "seed_index": run.params[SEED], "reason": run.reason} for run in member.failed],
    }


def _spread_json(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {
        "mean": spread.mean,
        "lowest": spread.lowest,
        "highest": spread.highest,
        "sd": spread.deviation,
        "values": list(spread.values),
    }


def write_files(result: Result, folder: Path) -> dict[str, Path]:
    """The files of a confirmation, each written in one step -> by name."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = json.dumps(as_json(result), indent=1, allow_nan=False) + "\n", markdown(result), latex(result)
    paths = {name: folder / name for name in FILES}
    for path, content in zip(paths.values(), contents, strict=True):
        atomic_files.write_text(path, content)
    return paths


def _caption(result: Result) -> str:
    return f"{setting(result)} {explanation(result)}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"
