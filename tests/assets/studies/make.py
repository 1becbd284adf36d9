"""python make.py TREE OUT [--engine]: let an earlier version of this program make a study, and kill it in the middle.

TREE is a checkout of that version (git worktree add TREE COMMIT). --engine is for versions that stop trials early. What
is written to OUT is described in README.md. Takes a minute.
"""

import argparse
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

LONG = 300  # epochs of the trial that is killed in its training
FAILS = {"loss": "no_distillation", "alpha": 0.1, "epochs": 2, "l1": 1e38}  # not finite
KILLED = {"loss": "cc_dist", "alpha": 0.6, "beta": 1, "epochs": LONG, "l1": 1e-6}
Point = dict[str, Any]


def _plain(alpha: float, epochs: int, l1: float = 1e-6) -> Point:
    return {"loss": "no_distillation", "alpha": alpha, "epochs": epochs, "l1": l1}


def _distilled(epochs: int) -> Point:
    return {"loss": "cc_dist", "alpha": 0.3, "beta": 5, "epochs": epochs, "l1": 1e-6}


POINTS: list[Point] = [_distilled(3), _plain(0.1, 2), FAILS, KILLED, _plain(0.9, 3, 1e-5)]
ENGINE_POINTS: list[Point] = [
    _distilled(6),
    _plain(0.1, 9),
    FAILS | {"epochs": 6},
    *(_plain(alpha, 9) for alpha in (0.2, 0.4, 0.6, 0.9)),
    _plain(0.1, 6, 3e-3),  # its verification is stopped
    _plain(0.9, 9, 1.0),  # its training is stopped
    KILLED,
    _plain(0.8, 9, 1e-5),
]

# A driver that ends after so many suggested values, as a kill between two writes would end it.
DYING = """
import os, optuna
left, original = [int(os.environ["DIE_AFTER_VALUES"])], optuna.trial.Trial._suggest
def dying(*arguments, **named):
    value = original(*arguments, **named)
    left[0] -= 1
    if left[0] == 0:
        os._exit(9)
    return value
optuna.trial.Trial._suggest = dying
"""
MAIN = "import sys; from search.run import main; sys.exit(main(sys.argv[1:]))"


def space(points: list[Point], *, engine: bool) -> dict[str, Any]:
    alpha = {"low": 0.01, "high": 1.0, "log": True}
    tree: dict[str, Any] = {
        "name": "old",
        "data": {"name": "digits", "validation": 0.2, "train_images": 256, "validation_images": 60},
        "threat": {"norm": "linf", "epsilon": "1/20"},
        "network": {"name": "mlp", "width": 8},
        "teacher": {"epochs": 2, "batch_size": 32},
        "student": {
            "epochs": {"low": 2, "high": LONG, "integer": True, "log": True},
            "batch_size": 32,
            "loss": {
                "choices": {
                    "cc_dist": {"kind": "cc_dist", "alpha": alpha, "beta": {"low": 0.5, "high": 50, "log": True}},
                    "no_distillation": {"kind": "cc_ibp", "alpha": dict(alpha)},
                }
            },
            "attack": {"steps": 1, "step_size": 1},
            "learning_rate": {"kind": "multi_step", "initial": 0.01},
            "l1": {"low": 1e-8, "high": 1e38, "log": True},
            "epsilon_schedule": {"ramp": 0.5},
        },
        "verification": {"attack": {"steps": 5, "step_size": 0.25}, "rungs": ["pgd", "ibp", "crown"]},
        "search": {"sampler": "tpe", "reference": [0.1, 0.0], "points": points},
        "budget": {"trials": len(points) - 1},
    }
    if engine:
        tree["verification"]["rungs"].append("branch_and_bound")
        tree["verification"]["branch_and_bound"] = {"timeout_s": 0.001, "max_branches": 1}
        tree["stopping"] = {"peers": 1}
    return tree


class Maker:
    """A study of one version, in a scratch folder."""

    def __init__(self, tree: Path, *, engine: bool) -> None:
        self.tree = tree.resolve()
        self.points = ENGINE_POINTS if engine else POINTS
        self.work = Path(tempfile.mkdtemp(prefix="old-study-"))
        self.storage, self.space = self.work / "storage", self.work / "space.yaml"
        self.space.write_text(yaml.safe_dump(space(self.points, engine=engine), sort_keys=False))

    def start(self, *settings: str, dies_after: int | None = None) -> subprocess.Popen[bytes]:
        env = dict(os.environ, PYTHONPATH=str(self.tree), OMP_NUM_THREADS="1", DIE_AFTER_VALUES=str(dies_after))
        code = MAIN if dies_after is None else DYING + MAIN
        command = [sys.executable, "-c", code, str(self.space), "--storage", str(self.storage)]
        for setting in settings:
            command += ["--set", setting]
        return subprocess.Popen(command, cwd=self.tree, env=env, start_new_session=True)

    def kill_in_the_long_training(self, driver: subprocess.Popen[bytes]) -> None:
        number = next(index for index, point in enumerate(self.points) if point["epochs"] == LONG)
        state = self.storage / "artifacts" / "old" / "trials" / f"old-{number:04d}" / "state.safetensors"
        while not state.exists() and driver.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        self.kill(driver)

    def kill(self, driver: subprocess.Popen[bytes]) -> None:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        time.sleep(6)  # Ray's own processes follow their driver

    def front(self) -> str:
        command = [sys.executable, "-m", "search.front", "old", "--storage", str(self.storage), "--json"]
        env = dict(os.environ, PYTHONPATH=str(self.tree))
        return subprocess.run(command, cwd=self.tree, env=env, capture_output=True, text=True, check=True).stdout

    def keep(self, out: Path) -> None:
        """What a later program can go on from, without what is large."""
        front = self.front()
        shutil.rmtree(out, ignore_errors=True)
        (out / "storage").mkdir(parents=True)
        (out / "front.json").write_text(front)
        shutil.copy(self.space, out)
        database = sqlite3.connect(self.storage / "study.db")
        database.execute("VACUUM INTO ?", (str(out / "storage" / "study.db"),))
        database.close()
        for path in (self.storage / "artifacts").rglob("*"):
            place = path.relative_to(self.storage)
            passing = path.suffix in (".lock", ".claim", ".beat", ".html", ".png") or path.name.startswith(".")
            if path.is_file() and not passing and path.name != "lock" and "locks" not in place.parts:
                (out / "storage" / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, out / "storage" / place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", action="store_true")
    args = parser.parse_args()
    maker, one = Maker(args.tree, engine=args.engine), ["resources.concurrency=1"]
    if args.engine:
        maker.start(*one, "stopping.verification=false", "stopping.peers=99", "budget.trials=6").wait()
        maker.start(*one, "stopping.peers=99", "budget.trials=7").wait()
        maker.kill_in_the_long_training(maker.start(*one, "stopping.agreement=-1"))
    else:
        maker.kill_in_the_long_training(maker.start(*one))
        # Five values of the trial that it takes over, and two of the last point.
        maker.kill(maker.start("resources.concurrency=2", "resources.cpu=0.5", dies_after=7))
    maker.keep(args.out)
    shutil.rmtree(maker.work)


if __name__ == "__main__":
    main()
