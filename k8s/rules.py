"""Writes what the service's own rules are in Kubernetes: `python -m k8s.rules`."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = "cluster/prometheus/rules.yaml"
TARGET = ROOT / "k8s" / "components" / "monitoring" / "service-rule.yaml"
HEADER = f"""\
# Made by `python -m k8s.rules` from {SOURCE}.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: qwen3-serve-service
spec:
"""


def manifest() -> str:
    """The text of the PrometheusRule."""
    lines = (ROOT / SOURCE).read_text(encoding="utf-8").splitlines()
    return HEADER + "".join(f"  {line}\n" for line in lines if not line.startswith("#"))


if __name__ == "__main__":
    TARGET.write_text(manifest(), encoding="utf-8")
