"""The tables of READMEs that are made from records: `python -m tests.tables` writes them; a test holds them.

In a README a table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tierewrite.cli.topics import exit_codes_table, formats_table, schemas_table

ROOT = Path(__file__).parent.parent
TABLES: Mapping[str, tuple[str, Callable[[], list[str]]]] = {
    "formats": ("tierewrite/formats/README.md", formats_table),
    "schemas": ("tierewrite/cli/README.md", schemas_table),
    "exit codes": ("tierewrite/cli/README.md", exit_codes_table),
}
"""Name -> the README that it stands in, and what makes it."""


def with_tables(readme: str, text: str) -> str:
    """`text` of a README with each of its tables as the records have it now."""
    for name, (place, made) in TABLES.items():
        if place == readme:
            table = "\n".join([f"<!-- table: {name} -->", "", *made(), "", "<!-- end -->"])
            text, count = re.subn(
                rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, t=table: t, text, flags=re.DOTALL
            )
            assert count == 1, (readme, name)
    return text


def write() -> None:
    """Puts all tables in their places."""
    for readme in {place for place, _ in TABLES.values()}:
        path = ROOT / readme
        path.write_text(with_tables(readme, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
