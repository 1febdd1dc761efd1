#!/bin/bash
# down.sh BASE: stops what up.sh BASE started, munged aside, and waits until it is gone.
base=${1:?the folder given to up.sh}
pids=$(cat "$base"/restd.pid "$base"/slurmd.*.pid "$base"/slurmctld.pid 2> /dev/null)
kill $pids 2> /dev/null
for _ in $(seq 150); do
    kill -0 $pids 2> /dev/null || exit 0  # true while one of them lives
    sleep .1
done
echo "down.sh: still running after 15 seconds: $pids" >&2
exit 1
