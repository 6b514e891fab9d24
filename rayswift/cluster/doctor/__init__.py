"""What is wrong with a cluster, before a long job finds out: `probe` runs on the nodes, `checks` says what its reports
mean, and `examine` brings both together."""

from rayswift.cluster.doctor.checks import Finding, Level
from rayswift.cluster.doctor.examination import Examination, default_hub, examine, quick_look

__all__ = ["Examination", "Finding", "Level", "default_hub", "examine", "quick_look"]
