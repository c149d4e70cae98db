#!/usr/bin/env bash
# cluster.sh - a throw-away, real Slurm cluster inside one Linux host, for tests.
#
#   cluster.sh up             start slurmctld on a login node and slurmd on n1, n2, ...
#   cluster.sh exec CMD...    run CMD on the login node (sbatch, squeue, pytest, a shell)
#   cluster.sh on NODE CMD... run CMD on a node, past Slurm
#   cluster.sh wait JOB [S]   wait up to S seconds (120) until JOB has ended, print
#                              'STATE ExitCode=N:SIG Restarts=N'; exit 0 if COMPLETED,
#                              1 if it ended otherwise, 2 if it has not ended
#   cluster.sh crash NODE     power NODE off: kill -9 all it runs, mark it DOWN
#                              (with --silent: let Slurm find out by itself, ~30 s)
#   cluster.sh boot NODE      start a crashed node again
#   cluster.sh cut NODE       unplug NODE's network cable; its processes live on
#   cluster.sh plug NODE      plug it in again
#   cluster.sh down           stop everything and leave nothing behind
#
# Every node is a network and UTS namespace with its own host name, IP address and
# /etc/hosts, so MASTER_ADDR, host names, ports and network faults are as on separate
# machines.  Files, users and process ids are shared, as with a parallel file system.
# GPUs are stand-ins (null devices): --gpus-per-node, --gres and CUDA_VISIBLE_DEVICES
# work, CUDA does not.  Nodes may claim more cores than the host has.
#
# Needs root on Debian or Ubuntu; installs slurm-wlm, munge and iproute2 if missing.
# Needs no systemd, no cgroups and no free port, and leaves /etc and the host's own
# network, munge and Slurm (if any) as they are.
#
# Settings: CLUSTER_NAME (mgc), CLUSTER_NODES (2); per node CLUSTER_CPUS (4),
# CLUSTER_GPUS (2), CLUSTER_MEM (8000 MB); CLUSTER_GRACE (15), the seconds a preempted
# job has; CLUSTER_EXTRA, more lines for slurm.conf, for example
# SlurmctldParameters=preempt_send_user_signal.
set -Eeuo pipefail

NAME=${CLUSTER_NAME:-mgc}             # names the namespaces and the folder
NODES=${CLUSTER_NODES:-2}
CPUS=${CLUSTER_CPUS:-4}
GPUS=${CLUSTER_GPUS:-2}
MEM=${CLUSTER_MEM:-8000}
GRACE=${CLUSTER_GRACE:-15}
DIR=/tmp/$NAME-cluster
NET=192.0.2                             # TEST-NET-1: no real host has these addresses
export SLURM_CONF=$DIR/slurm.conf

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# --- nodes -----------------------------------------------------------------------

netns() { printf '%s-%s' "$NAME" "$1"; }

# on NODE CMD...: run CMD there.  Not 'ip netns exec', which remounts /sys: slurmd
# gives up when there is no /sys/fs/cgroup.
on() {
    local node=$1; shift
    # shellcheck disable=SC2016
    nsenter --net="/run/netns/$(netns "$node")" unshare --uts --mount sh -c '
        hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"' \
        sh "$node" "$DIR/hosts" "$@"
}

# pids NODE: every process that runs there
pids() { ip netns pids "$(netns "$1")" 2>/dev/null || true; }

kill_all() {
    local list; list=$(pids "$1")
    # shellcheck disable=SC2086
    [[ -z $list ]] || kill -9 $list 2>/dev/null || true
}

until_true() {                          # until_true SECONDS CMD...
    local end=$((SECONDS + $1)); shift
    until "$@"; do ((SECONDS < end)) || return 1; sleep 0.1; done
}

node_ready() {
    [[ $(on login sinfo -h -N -p train -n "$1" -o %T 2>/dev/null) =~ ^(idle|mixed|allocated)$ ]]
}

boot() {
    mkdir -p "$DIR/spool/$1"
    on "$1" slurmd -N "$1"
    until_true 20 node_ready "$1" || { say "node $1 did not come up"; return 1; }
}

crash() {
    kill_all "$1"
    rm -f "$DIR/run/$1.pid"
    [[ ${2-} == --silent ]] || on login scontrol update nodename="$1" state=down reason=crash
}

# --- up --------------------------------------------------------------------------

install_packages() {
    local tool missing=
    for tool in slurmctld slurmd srun munged ip nsenter; do
        command -v "$tool" >/dev/null || missing+=" $tool"
    done
    [[ -n $missing ]] || return 0
    command -v apt-get >/dev/null || die "not found:$missing"
    say "installing slurm-wlm, munge and iproute2"
    # Recommended packages would pull in a mail server and a database; none is used.
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
        --no-install-recommends slurm-wlm munge iproute2 util-linux; } \
        >"$DIR/log/apt.log" 2>&1 || return 1
}

write_conf() {
    local i
    cat >"$SLURM_CONF" <<CONF
ClusterName=$NAME
SlurmctldHost=login($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job is held back; 120 s if not set.
AuthInfo=socket=$DIR/munge.sock,cred_expire=5
MpiDefault=none
# No cgroups needed: processes are followed by parent process, nothing is confined.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
# A job in partition "urgent" takes its nodes from jobs in "train": they get SIGTERM,
# GraceTime, SIGKILL, and go back to the queue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=900
SlurmdParameters=config_overrides
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdPidFile=$DIR/run/%n.pid
SlurmdLogFile=$DIR/log/%n.log
SlurmdSpoolDir=$DIR/spool/%n
GresTypes=gpu
${CLUSTER_EXTRA-}
NodeName=DEFAULT CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN
CONF
    printf '127.0.0.1 localhost\n%s.1 login\n' "$NET" >"$DIR/hosts"
    for ((i = 1; i <= NODES; i++)); do
        echo "NodeName=n$i NodeAddr=$NET.$((10 + i))" >>"$SLURM_CONF"
        echo "$NET.$((10 + i)) n$i" >>"$DIR/hosts"
    done
    cat >>"$SLURM_CONF" <<CONF
PartitionName=train Nodes=ALL Default=YES PriorityTier=1 GraceTime=$GRACE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP
CONF
    : >"$DIR/gres.conf"
    ((GPUS == 0)) || echo "Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
    for ((i = 0; i < GPUS; i++)); do mknod "$DIR/dev/gpu$i" c 1 3; done
}

make_network() {                        # one bridge, on the login node, and a cable to each node
    local i login ns
    login=$(netns login)
    ip netns add "$login"
    ip -n "$login" link set lo up
    ip -n "$login" link add br0 type bridge
    ip -n "$login" addr add "$NET.1/24" dev br0
    ip -n "$login" link set br0 up
    for ((i = 1; i <= NODES; i++)); do
        ns=$(netns "n$i")
        ip netns add "$ns"
        ip -n "$ns" link set lo up
        ip -n "$login" link add "n$i" type veth peer name eth0 netns "$ns"
        ip -n "$login" link set "n$i" master br0 up
        ip -n "$ns" addr add "$NET.$((10 + i))/24" dev eth0
        ip -n "$ns" link set eth0 up
    done
}

start_munge() {                         # with a key and a socket of our own
    (umask 077 && head -c 128 /dev/urandom >"$DIR/munge.key")
    on login munged --force --socket="$DIR/munge.sock" --key-file="$DIR/munge.key" \
        --pid-file="$DIR/run/munged.pid" --seed-file="$DIR/munge.seed" \
        --log-file="$DIR/log/munged.log"
    until_true 5 test -S "$DIR/munge.sock"
}

failed() {
    trap - ERR
    say "start failed; the ends of its logs:"
    tail -n 15 "$DIR"/log/* >&2 || true
    down
    exit 1
}

up() {
    local i
    [[ $EUID -eq 0 ]] || die "must be root"
    [[ ! -e $DIR ]] || die "$DIR is there already: 'down' first"
    mkdir -p "$DIR"/{run,log,state,spool,dev}
    chmod 755 "$DIR"                    # munge wants a path that all may search
    trap failed ERR
    install_packages
    write_conf
    make_network
    start_munge
    on login slurmctld
    for ((i = 1; i <= NODES; i++)); do boot "n$i"; done
    trap - ERR
    say "$NODES nodes up; try: $0 exec srun -N$NODES hostname"
}

# --- down ------------------------------------------------------------------------

down() {
    local ns
    # A namespace holds nothing but what this cluster started and what was run with 'exec'.
    for ns in $(ip netns list 2>/dev/null | awk -v p="$NAME-" 'index($1, p) == 1 {print $1}'); do
        kill_all "${ns#"$NAME"-}"
        ip netns del "$ns"
    done
    rm -rf "${DIR:?}"
    say "down"
}

# --- jobs ------------------------------------------------------------------------

# Not 'sbatch --wait': it polls ever more slowly and can be 30 s late.
wait_job() {
    local end=$((SECONDS + $2)) rec state
    while :; do
        rec=$(on login scontrol -o show job "$1" 2>/dev/null) || die "no such job: $1"
        state=$(grep -o ' JobState=[A-Z_]*' <<<"$rec")
        state=${state#*=}
        case $state in
            PENDING | CONFIGURING | RUNNING | SUSPENDED | COMPLETING | REQUEUED | PREEMPTED) ;;
            *) break ;;
        esac
        ((SECONDS < end)) || { echo "$state"; exit 2; }
        sleep 0.2
    done
    echo "$state$(grep -o ' ExitCode=[0-9:]*' <<<"$rec")$(grep -o ' Restarts=[0-9]*' <<<"$rec")"
    [[ $state == COMPLETED ]]
}

case ${1-} in
    up | down) "$1" ;;
    exec)      shift; on login "$@" ;;
    on)        shift; on "$@" ;;
    wait)      wait_job "${2:?JOB}" "${3:-120}" ;;
    crash)     crash "${2:?NODE}" "${3-}" ;;
    boot)      boot "${2:?NODE}" ;;
    cut)       ip -n "$(netns login)" link set "${2:?NODE}" down ;;
    plug)      ip -n "$(netns login)" link set "${2:?NODE}" up ;;
    *)         sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
