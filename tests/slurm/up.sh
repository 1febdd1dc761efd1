#!/bin/bash
# up.sh BASE [backfill|builtin]: starts munged, slurmctld, one slurmd per node and slurmrestd (unix socket
# BASE/restd.sock), and returns when all nodes are idle, after about a second. Root, Debian 12:
#   apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y slurm-wlm munge slurmrestd
# `export SLURM_CONF=BASE/slurm.conf` for squeue, scontrol and the like. down.sh BASE stops it.
set -e
here=$(dirname "$(realpath "$0")")
base=$(realpath -m "${1:?a folder for its state}")
nodes="n1 n2 n3 n4"
mkdir -p "$base/state"
sed "s|@BASE@|$base|; s|@SCHEDULER@|${2:-backfill}|" "$here/slurm.conf.in" > "$base/slurm.conf"
export SLURM_CONF=$base/slurm.conf
if scontrol ping 2>/dev/null | grep -q "is UP"; then
    echo "up.sh: a slurmctld already answers on the port in $SLURM_CONF; stop it first (down.sh)" >&2
    exit 2
fi
install -d -o munge -g munge -m 755 /run/munge
munge -n < /dev/null > /dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
slurmctld
for node in $nodes; do
    mkdir -p "$base/spool.$node"
    slurmd -N "$node"
done
"$here/restd.sh" "$base"
for _ in $(seq 150); do
    sleep .1
    states=$(sinfo --noheader --Node --format %T 2>/dev/null | sort -u)
    [ "$states" = idle ] && [ -S "$base/restd.sock" ] && exit
done
echo "up.sh: the nodes are not idle after 15 seconds (${states:-no answer}); see $base/slurmctld.log" >&2
exit 1
