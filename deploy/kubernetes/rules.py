"""The rules of deploy/prometheus as the Prometheus operator takes them.

python deploy/kubernetes/rules.py       writes components/monitoring/rules.yaml; a test fails when it is stale
"""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
TARGET = HERE / "components" / "monitoring" / "rules.yaml"
HEAD = "# Made by deploy/kubernetes/rules.py from deploy/prometheus/rules; change them there.\n"


class Dumper(yaml.SafeDumper):
    """Expressions of several lines as such."""


Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def rendered() -> str:
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "xgen"},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.dump(rule, Dumper=Dumper, sort_keys=False, width=120)


if __name__ == "__main__":
    TARGET.write_text(rendered())
