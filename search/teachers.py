"""Teachers by content hash: each recipe is trained once, whoever asks, and stored whole or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ccdist import checkpoint
from ccdist.config import TeacherConfig, ThreatModel, fingerprint
from ccdist.networks import Network
from ccdist.training import TrainingResult
from search.locks import exclusive

# Raised when teacher training changes what it computes: older teachers are then no longer the same recipe.
RECIPE_VERSION = 1

# Trains a teacher, going on from the state file if it exists.
TrainTeacher = Callable[[Path], TrainingResult]


@dataclass(frozen=True)
class Teacher:
    """A teacher, and the seconds that this call spent to train it: 0 when it was there."""

    network: Network
    key: str
    seconds: float


def teacher_key(data_fingerprint: str, threat: ThreatModel, config: TeacherConfig) -> str:
    """Hash of all that a teacher depends on."""
    return fingerprint(
        {
            "data": data_fingerprint,
            "threat": threat.model_dump(mode="json"),
            "teacher": config.model_dump(mode="json"),
            "version": RECIPE_VERSION,
        }
    )


def get_or_train(directory: Path, key: str, train: TrainTeacher) -> Teacher:
    """The teacher of that key, trained now if nobody has.

    Callers with the same key wait for the one that trains; if it dies, its lock dies with it and the next one
    goes on from its last epoch.

    Raises:
        CorruptCheckpointError: the stored teacher, or its training state, is damaged.
    """
    folder = directory / key
    with exclusive(directory / f"{key}.lock", wait=True):
        if folder.exists():
            return Teacher(checkpoint.load(folder), key, 0.0)
        state = directory / f"{key}.state.safetensors"
        result = train(state)
        checkpoint.save(folder, result.network, {"seconds": result.seconds, "history": result.history})
        state.unlink(missing_ok=True)
        return Teacher(result.network, key, result.seconds)
