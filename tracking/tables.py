"""Tables as MLflow's artifact page shows them: a JSON file of columns and rows, and a tag that names such files.

MLflow has no preview of Parquet, and shows any other JSON as text. What the page reads was found in MLflow 3.17.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

# MLflow's own tag of a run: which of its artifacts are tables.
TAG_TABLES = "mlflow.loggedArtifacts"


def table_json(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The text of a table's file; what is not a finite number is empty there, as JSON has none."""
    # Row by row: at once, ten thousand of them would keep every other thread waiting.
    data = ", ".join(json.dumps([_finite(value) for value in row], allow_nan=False) for row in rows)
    return f'{{"columns": {json.dumps(list(columns))}, "data": [{data}]}}'


def tables_tag(*paths: str) -> dict[str, str]:
    """The tag of a run whose artifacts of these paths are tables."""
    return {TAG_TABLES: json.dumps([{"path": path, "type": "table"} for path in paths])}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
