"""A search whose trials end as a test says, without Ray: the searcher, its study and what stands in for the rest."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from studies import config_of, open_study
from test_searcher import FakeFiles, FakeScheduler, FakeTeachers, Log, succeed

from search.attempts.deaths import Cause
from search.attempts.shares import Node
from search.config import BudgetConfig
from search.scheduling.budget import Budget
from search.scheduling.waiting import TeacherQueue
from search.searcher import StudySearcher
from search.studies.records import RungValues
from search.study import Study
from search.suggestions.asking import Asker, Inline
from search.worker import Suggestion


def databases_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each URL, for the time of a test: opened again, it is the same one."""
    stores: dict[str, InMemoryStorage] = {}
    monkeypatch.setattr("search.study.open_storage", lambda url: stores.setdefault(url, InMemoryStorage()))


NODE = Node(8.0, 4)


@dataclass
class Bench:
    """A study with its searcher, whose trials end as the test says. Nodes have 8 GiB for four trials each."""

    folder: Path
    resources: dict[str, Any] = field(default_factory=dict)
    target: int = 4
    slots: int = 2
    limits: dict[str, float] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    files: FakeFiles = field(default_factory=FakeFiles)
    scheduler: FakeScheduler = field(default_factory=FakeScheduler)
    teachers: FakeTeachers = field(default_factory=FakeTeachers)
    teacher: str | None = None
    now: float = 1_000_000.0
    number: int = 0
    node: Node | None = NODE

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Another driver takes over."""
        config = config_of(self.folder, resources=self.resources, budget__trials=self.target)
        self.study: Study = open_study(config, self.folder / "study.db")
        self.searcher = StudySearcher(
            self.study,
            Budget(BudgetConfig(trials=self.target, **self.limits), config.resources, self.study.trials),
            lambda: self.slots,
            self.files,
            self.log,
            self.scheduler,
            Asker(Inline(), ahead=False),
            TeacherQueue(lambda _: self.teacher, self.teachers),
            node=lambda **_: self.node,
            clock=lambda: self.now,
        )

    def next(self, *, starts: bool = True) -> tuple[str, Suggestion]:
        """The next trial, which has to come at once; starts: it need not wait in Ray's queue."""
        self.number += 1
        config = self.searcher.suggest(f"tune{self.number}")
        assert isinstance(config, dict), config
        if starts:
            self.searcher.on_trial_start(f"tune{self.number}")
        return f"tune{self.number}", Suggestion.from_config(config)

    def fill(self) -> dict[str, Suggestion]:
        """As many trials as may run now beside those that do, by Tune's id."""
        started: dict[str, Suggestion] = {}
        while isinstance(config := self.searcher.suggest(f"tune{self.number + 1}"), dict):
            self.number += 1
            self.searcher.on_trial_start(f"tune{self.number}")
            started[f"tune{self.number}"] = Suggestion.from_config(config)
        return started

    def attempt(self, number: int = 0) -> int:
        """Of the run that is on, or comes next."""
        return self.study.trials()[number].attempt

    def nothing_now(self) -> bool:
        return self.searcher.suggest("nobody") is None

    def die(self, trial_id: str, reason: str, node: str = "host-a") -> None:
        """As the scheduler and Tune tell it: first why, then that."""
        self.scheduler.causes[trial_id] = Cause(reason, node)
        self.searcher.on_trial_complete(trial_id, None, error=True)

    def lack(self, trial_id: str, *, on_gpu: bool) -> None:
        text = "out of memory: Tried to allocate 2 GiB"
        report = {"state": "OUT_OF_MEMORY", "reason": text, "on_gpu": on_gpu, "hostname": "host-b"}
        self.searcher.on_trial_complete(trial_id, report)

    def complete(self, trial_id: str, suggestion: Suggestion) -> None:
        self.searcher.on_trial_complete(trial_id, succeed(suggestion))

    def deaths(self, number: int = 0) -> list[str]:
        return [death.reason for death in self.study.trials()[number].deaths]


def memory_held(bench: Bench) -> float | None:
    """What the next trial reserves."""
    share = bench.next()[1].share
    assert share is not None
    return share.memory_gb


def a_report(key: str, state: str = "RUNNING") -> dict[str, Any]:
    values = {"rung": "1/9", "values": json.dumps(asdict(RungValues(0.5, 0.1, 1.0)))} if state == "RUNG" else {}
    return {"key": key, "state": state, "phase": "student", "step": 1, "steps": 2} | values
