#!/usr/bin/env bash
# A real Slurm of one node on this machine, for trying `results_table.py --cluster slurm`; to be run as root, in a
# container or on a machine that may be changed:
#
#     tests/cluster/one_node_slurm.sh start     # installs Debian's slurm-wlm and munge if they are missing
#     tests/cluster/one_node_slurm.sh stop
#
# Two partitions share the node: jobs in "urgent" preempt those in "batch", which go back into the queue.
set -euo pipefail
spool=${SLURM_SPOOL:-/var/spool/one_node_slurm}
configuration=/etc/slurm/slurm.conf

stop() {
  pkill -x slurmd || true
  pkill -x slurmctld || true
  pkill -x munged || true
}

start() {
  if ! command -v slurmctld munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge
  fi
  stop
  mkdir -p "$spool"/{controller,node} /run/munge /etc/slurm
  [ -s /etc/munge/munge.key ] || mungekey
  chown -R munge: /run/munge /etc/munge /var/lib/munge /var/log/munge
  local node
  node=$(hostname -s)
  cat >"$configuration" <<CONF
ClusterName=one_node
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$spool/controller
SlurmdSpoolDir=$spool/node
SlurmctldLogFile=$spool/slurmctld.log
SlurmdLogFile=$spool/slurmd.log
SlurmctldPidFile=$spool/slurmctld.pid
SlurmdPidFile=$spool/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,preempt_send_user_signal  # later PreemptParameters=send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=batch Nodes=$node Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=$node PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
  runuser -u munge -- munged
  slurmctld -c
  slurmd
  for _ in $(seq 60); do
    sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed|allocated' && exec sinfo
    sleep 1
  done
  tail -n 20 "$spool"/*.log
  echo "error: the node did not come up within a minute; the logs are above" >&2
  exit 1
}

case ${1:-} in
  start | stop) "$1" ;;
  *) echo "usage: $0 start|stop" >&2; exit 2 ;;
esac
