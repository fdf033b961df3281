"""`localgrad doctor`."""

from __future__ import annotations

import json

from localgrad.cli.console import new_console, new_table
from localgrad.cli.options import DataRoot, Json


def doctor(data_root: DataRoot = None, as_json: Json = False) -> None:
    """Show versions, devices and the data found, and say what is wrong with them."""
    from localgrad.study.doctor import findings

    rows = findings(data_root)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        table = new_table("what", "found", "remark", left=3)
        for row in rows:
            table.add_row(row["what"], row["found"], row["remark"])
        new_console().print(table)
