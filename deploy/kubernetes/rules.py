"""The rules of deploy/prometheus as the Prometheus operator takes them.

python deploy/kubernetes/rules.py       writes components/monitoring/rules.yaml; a test tells when it is stale
"""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
TARGET = HERE / "components" / "monitoring" / "rules.yaml"
HEAD = "# Made by deploy/kubernetes/rules.py from deploy/prometheus/rules; change them there.\n"


def rendered() -> str:
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "xgen"},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, width=120)


if __name__ == "__main__":
    TARGET.write_text(rendered())
