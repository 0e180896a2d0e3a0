"""A laboratory: several hosts on one machine, on links of known speed.

    with Lab(hosts=2, link="1gbit") as lab:
        lab.run(1, ["ping", "-c", "1", lab.address(0)])

``run_ranks`` starts one process of a module on every host and answers what they report.
"""

from benchmarks.lab.features import LabError
from benchmarks.lab.network import HEADERS, Lab
from benchmarks.lab.ranks import nic_counters, report, run_ranks

__all__ = ["HEADERS", "Lab", "LabError", "nic_counters", "report", "run_ranks"]
