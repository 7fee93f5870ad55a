"""Write papers/rows.yaml from papers/systems.yaml: one entry a scale and seed, all spelt out."""

import yaml

from ssnas.config.load import PARAMS, ROWS, read_yaml
from ssnas.config.systems import SYSTEMS, expand
from stages.cli import guarded

HEAD = """\
# Generated from systems.yaml by `python -m stages.rows`: the rows of the papers' tables as DVC
# reads them. Edit systems.yaml.
"""


def write_rows() -> None:
    entries = expand(read_yaml(SYSTEMS), list(read_yaml(PARAMS)["scales"]), SYSTEMS)
    lines = [HEAD.rstrip()]
    for kind, rows in entries.items():
        lines.append(f"\n{kind}:")
        for key, entry in rows.items():
            text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10**6)
            lines.append(f"  {key}: {text.strip()}")
    ROWS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    guarded(write_rows)
