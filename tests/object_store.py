"""An object store in memory whose operations can be counted, cut off, made to fail, and taken in turns."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyarrow.fs import FileInfo, FileSelector, FileType


class Killed(BaseException):
    """The process dies here."""


class Disk:
    """What several processes share: objects by their paths."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.changed: set[str] = set()  # objects that were written over with something else


class Store:
    """The part of `pyarrow.fs.FileSystem` that this project uses, as one process sees it.

    Args:
        whole: a file is there once it is closed, and not before, as with S3; else a killed writer leaves a part.
        before, after: called with the number of each operation, before it and when it is done; they may raise.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        whole: bool = True,
        before: Callable[[int], None] = lambda _number: None,
        after: Callable[[int], None] = lambda _number: None,
    ) -> None:
        self.disk, self.type_name = disk, "s3" if whole else "py"
        self._whole, self._before, self._after = whole, before, after
        self.operations = 0

    @contextmanager
    def _operation(self) -> Iterator[dict[str, bytes]]:
        number = self.operations
        self.operations += 1
        self._before(number)
        yield self.disk.objects
        self._after(number)

    def get_file_info(self, what: str | FileSelector) -> FileInfo | list[FileInfo]:
        with self._operation() as objects:
            if isinstance(what, str):
                kind = FileType.File if what in objects else FileType.NotFound
                return FileInfo(what, kind, size=len(objects.get(what, b"")))
            below = [path for path in objects if path.startswith(f"{what.base_dir}/")]
            if what.recursive:
                return [FileInfo(path, FileType.File, size=len(objects[path])) for path in below]
            names = {path[len(what.base_dir) + 1 :].partition("/")[::2] for path in below}
            return [
                FileInfo(f"{what.base_dir}/{name}", FileType.Directory if rest else FileType.File)
                for name, rest in sorted(names)
            ]

    def open_input_stream(self, path: str) -> io.BytesIO:
        with self._operation() as objects:
            if path not in objects:
                raise FileNotFoundError(2, "no such object", path)
            return io.BytesIO(objects[path])

    @contextmanager
    def open_output_stream(self, path: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        if not self._whole:
            with self._operation() as objects:
                objects[path] = b""
        yield content
        if not self._whole:
            with self._operation() as objects:
                objects[path] = content.getvalue()[: len(content.getvalue()) // 2]
        with self._operation() as objects:
            if self._whole and objects.get(path, content.getvalue()) != content.getvalue():
                self.disk.changed.add(path)
            objects[path] = content.getvalue()

    def move(self, source: str, target: str) -> None:
        with self._operation() as objects:
            objects[target] = objects.pop(source)

    def delete_file(self, path: str) -> None:
        with self._operation() as objects:
            if path not in objects:
                raise FileNotFoundError(2, "no such object", path)
            del objects[path]

    def create_dir(self, path: str, *, recursive: bool) -> None: ...

    def delete_dir(self, path: str) -> None: ...


class Turns:
    """Threads that take their operations in a given order: (thread, how many) one after the other."""

    def __init__(self, *phases: tuple[str, int]) -> None:
        self._phases = [list(phase) for phase in phases]
        self._over: set[str] = set()
        self._changed = threading.Condition()
        self.errors: dict[str, BaseException] = {}

    def wait(self, name: str) -> None:
        """Until it is that thread's turn."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn() in (name, None), 30)
            if self._phases:
                self._phases[0][1] -= 1
                self._changed.notify_all()

    def _turn(self) -> str | None:
        while self._phases and (self._phases[0][1] <= 0 or self._phases[0][0] in self._over):
            self._phases.pop(0)
        return str(self._phases[0][0]) if self._phases else None

    def run(self, **threads: Callable[[], object]) -> None:
        """All of them to their ends; what they raise is in `errors`."""

        def act(name: str, action: Callable[[], object]) -> None:
            try:
                action()
            except BaseException as error:
                self.errors[name] = error
            with self._changed:
                self._over.add(name)
                self._changed.notify_all()

        started = [threading.Thread(target=act, args=each) for each in threads.items()]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
