"""docs/SECURITY.md and the tests that attack what it claims agree."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Files that are about nothing else; others prove the rest.
OF_THE_PAGE = ("test_nothing_runs", "test_hostile_input", "test_secrets", "test_audit", "test_security")


def names_of_tests(file: Path) -> set[str]:
    found = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_claim_names_a_test_that_exists_and_every_test_of_these_files_a_claim() -> None:
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    named = re.findall(r"(?:(test_\w+)\.py::|`)(test_\w+)`", text)
    assert len(named) > 40
    last, missing = "", []
    for file, test in named:
        last = file or last  # the tests of one file follow each other in a claim
        if test not in names_of_tests(ROOT / "tests" / f"{last}.py"):
            missing.append(f"{last}.py::{test}")
    assert missing == []
    ours = set().union(*(names_of_tests(ROOT / "tests" / f"{file}.py") for file in OF_THE_PAGE))
    assert ours - {test for _, test in named} == set()
    claims = text.partition("## Claims")[2].partition("## Found")[0].split("\n- ")[1:]
    assert len(claims) > 15
    assert [claim for claim in claims if "`test_" not in claim] == []
