"""What has to be one for all studies of a comparison: numbers of different data or threats mean different things."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from search.errors import UserError
from search.studies.study_record import StoredStudy


class ComparisonError(UserError):
    """These studies cannot be compared; the text says which, why, and what to do."""


class _Sameness(NamedTuple):
    """Something that has to be one for all studies."""

    what: str
    value: Callable[[StoredStudy], Any]
    advice: str


def _images(stored: StoredStudy) -> str:
    data = stored.config.data
    limit = "all" if data.validation_images is None else str(data.validation_images)
    return f"validation: {data.validation:g}, split_seed: {data.split_seed}, validation_images: {limit}"


_SAME = (
    _Sameness("data sets", lambda stored: stored.record.dataset, "compare studies of one data set"),
    _Sameness("threats", lambda stored: stored.record.threat, "compare studies of one norm and epsilon"),
    _Sameness(
        "splits",
        lambda stored: stored.record.split,
        "compare searches with searches, and results on test images with results on test images",
    ),
    _Sameness("choices of images", _images, "search again with one choice in `data`, under another name"),
    _Sameness(
        "numbers of images", lambda stored: stored.record.num_images, "compare studies measured on the same images"
    ),
    _Sameness(
        "data fingerprints",
        lambda stored: stored.data_fingerprint,
        "their images, normalisation or augmentation are not the same: search again with one `data` section",
    ),
    _Sameness(
        "hypervolume references",
        lambda stored: tuple(stored.record.reference),
        "search again with one search.reference, under another name",
    ),
)


def check_comparable(studies: Mapping[str, StoredStudy]) -> None:
    """Refuse studies whose numbers mean different things.

    Args:
        studies: by title.

    Raises:
        ComparisonError: which two, in what, and both values.
    """
    if len(studies) < 2:
        raise ComparisonError("one study has nothing to be compared with; name two or more, or see search.front")
    titles: dict[str, str] = {}
    for title, stored in studies.items():
        first = titles.setdefault(stored.identifier, title)
        if first != title:
            raise ComparisonError(f"{first} and {title} are one study; name each once")
        if not stored.record.complete:
            raise ComparisonError(f"study {title} has no complete trial to compare yet; go on with its search first")
    (title, stored), *others = studies.items()
    for same in _SAME:
        for other_title, other in others:
            value, other_value = same.value(stored), same.value(other)
            if value != other_value:
                raise ComparisonError(
                    f"{title} and {other_title} cannot be compared: their {same.what} differ ({value} and "
                    f"{other_value}); {same.advice}"
                )


def flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their paths, a.b.c; lists are leaves."""
    for name, value in tree.items():
        where = f"{path}.{name}".lstrip(".")
        if isinstance(value, Mapping):
            yield from flat(value, where)
        else:
            yield where, value


def differs(path: str, values: Sequence[Mapping[str, Any]]) -> bool:
    return any(each.get(path) != values[0].get(path) for each in values)
