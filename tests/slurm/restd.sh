#!/bin/bash
# restd.sh BASE: starts slurmrestd alone, for the cluster that up.sh BASE has started.
set -e
base=$(realpath "${1:?the folder given to up.sh}")
rm -f "$base/restd.sock"
# It refuses to run as root unless told to; without openapi/v0.0.38 alone it wants slurmdbd, which is not there.
SLURM_CONF=$base/slurm.conf SLURMRESTD_SECURITY=disable_user_check setsid slurmrestd -s openapi/v0.0.38 \
    -a rest_auth/local "unix:$base/restd.sock" > "$base/restd.log" 2>&1 < /dev/null &
echo $! > "$base/restd.pid"
