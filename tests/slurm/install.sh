#!/bin/bash
# install.sh: Slurm, munge and slurmrestd from Debian's packages, unless they are there; says so where it cannot.
[ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/slurmd ] && [ -x /usr/sbin/slurmrestd ] && [ -x /usr/sbin/munged ] && exit
why="this is not root on Debian"
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    why="apt-get failed"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge slurmrestd > /dev/null && exit
fi
echo "install.sh: no slurm-wlm, munge and slurmrestd: $why; the tests with a real Slurm will be skipped" >&2
exit 1
