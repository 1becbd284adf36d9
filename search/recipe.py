"""What one trial computes from, and where its seeds come from."""

import hashlib

from ccdist.config import Config, DataConfig, StudentConfig, TeacherConfig, ThreatModel, VerifyConfig


class Recipe(Config):
    """Everything that one trial computes from: the same recipe gives the same result."""

    data: DataConfig
    threat: ThreatModel
    teacher: TeacherConfig
    student: StudentConfig
    verification: VerifyConfig

    @property
    def needs_teacher(self) -> bool:
        """Whether this student reads a teacher at all."""
        return self.student.loss.kind == "cc_dist" or self.student.initialization == "teacher"


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^31) that depends on all parts and on nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
