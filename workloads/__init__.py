"""Where jobs and clusters come from: SWF traces, recorded decisions, the Lublin-Feitelson model, generated clusters.

python -c "import workloads; print(workloads.load_workload('cloud').cluster)"
python -c "import workloads; print(workloads.load_workload('my_cluster.swf.gz', 'test').segments)"
"""

from workloads.jobs import Cluster, Jobs, Workload, WorkloadError
from workloads.load import load_workload

__all__ = ["Cluster", "Jobs", "Workload", "WorkloadError", "load_workload"]
