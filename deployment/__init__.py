"""The work behind `serve.py` and `slurm_agent.py`."""
