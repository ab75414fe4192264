# Runs the workers of one machine, on its loopback, for the link that has started this script through ssh.
#
# usage: agent.sh PROGRAM SILENCE SEED THREADS DEVICE...
#   PROGRAM  the RPC worker
#   SILENCE  seconds without a line on stdin after which the connection counts as cut
#   SEED     a random number, from which ports follow
#   THREADS  CPU threads of each worker
#
# Prints on stdout, where INDEX counts the devices from 0:
#   worker INDEX PORT       its worker was started, and will listen on this port
#   ended INDEX CODE PAUSE  its worker has ended with this exit code; it is started again after the pause in seconds
# What workers print comes out on stderr; nothing is written to a file.
#
# Everything ends when stdin does, or is silent for too long. POSIX sh has no `read` with a limit, so there are
# processes: `listen` reads stdin, and wakes `serve`, which counts seconds and owns the workers; `guard` ends the
# workers when `serve` itself is killed. Where all of these are killed at the same moment, Linux ends the workers
# (PR_SET_PDEATHSIG, by util-linux' setpriv), other systems do not.

program=$1 silence=$2 seed=$3 threads=$4
shift 4
sshd=$PPID

listen() {
    while read -r _; do kill -USR1 "$server" || exit; done
    kill -TERM "$server"
}

# Sets the variables of worker $1: pid, port, since, pause. A port is kept until it is found taken.
start_worker() {
    eval "port=\$port_$1 device=\$device_$1"
    if [ -z "$port" ]; then
        seed=$(((seed * 75 + 74) % 65537))
        port=$((16384 + seed % 16384)) # below the ports that systems give to outgoing connections
    fi
    # shellcheck disable=SC2086 # they are separate words
    $tied "$program" -H 127.0.0.1 -p "$port" -t "$threads" -d "$device" </dev/null >&2 3>&- &
    eval "pid_$1=$! port_$1=$port since_$1=$clock"
    tell_guard
    echo "worker $1 $port" >&3
}

tell_guard() {
    pids=
    index=0
    while [ "$index" -lt "$count" ]; do
        eval "pids=\"\$pids \$pid_$index\""
        index=$((index + 1))
    done
    echo "$pids" # to the guard, through the pipe
}

# Worker $1 has ended with exit code $2.
note_end() {
    eval "since=\$since_$1 pause=\$pause_$1"
    if [ $((clock - since)) -ge 60 ]; then
        pause=1
    fi
    # Its port may have been taken by another program: the next one is tried.
    [ $((clock - since)) -ge 2 ] || eval "port_$1="
    eval "pid_$1= again_$1=$((clock + pause)) pause_$1=$((pause < 16 ? pause * 2 : 30))"
    tell_guard
    echo "ended $1 $2 $pause" >&3
}

check_workers() {
    number=0
    while [ "$number" -lt "$count" ]; do
        eval "pid=\$pid_$number again=\$again_$number"
        if [ -n "$pid" ]; then
            if ! kill -0 "$pid" 2>/dev/null; then
                wait "$pid" # bash may forget its end if a signal comes with it: then it waits for the next heartbeat
                note_end "$number" $?
            fi
        elif [ "$clock" -ge "$again" ]; then
            start_worker "$number"
        fi
        number=$((number + 1))
    done
}

serve() {
    # $$ is the process that started this one.
    server=$(exec sh -c 'echo "$PPID"')
    missed=0 clock=0 count=0 ending= pids=
    trap 'missed=0' USR1
    trap 'ending=yes' TERM HUP INT
    for device in "$@"; do
        eval "pid_$count= port_$count= pause_$count=1 again_$count=0 since_$count=0 device_$count=\$device"
        count=$((count + 1))
    done
    listen <&4 >/dev/null 3>&- &
    listener=$!
    exec 4<&-
    while [ -z "$ending" ] && [ "$missed" -lt "$silence" ]; do
        check_workers
        sleep 1 >/dev/null 3>&- &
        nap=$!
        wait "$nap" # a signal ends it early
        if ! kill -0 "$nap" 2>/dev/null; then
            missed=$((missed + 1)) clock=$((clock + 1))
        fi
        kill -0 "$listener" 2>/dev/null || ending=yes
    done
    # shellcheck disable=SC2086 # they are separate words
    kill -KILL "$listener" "$nap" $pids 2>/dev/null
    [ "$missed" -lt "$silence" ] || echo silent # to the guard
}

guard() {
    trap '' TERM HUP INT
    pids= last=
    while read -r line; do
        if [ "$line" = silent ]; then last=silent; else pids=$line; fi
    done
    # shellcheck disable=SC2086 # they are separate words
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null
    # The network was cut without a word: nobody would end the session of sshd, either.
    if [ "$last" = silent ]; then
        case $(ps -o comm= -p "$sshd" 2>/dev/null || cat "/proc/$sshd/comm" 2>/dev/null) in
            *sshd* | *dropbear*) kill -TERM "$sshd" ;;
        esac
    fi
}

for name in $(env | sed -n '/^LLAMA_CACHE=/d; s/^\(LLAMA_[A-Z0-9_]*\)=.*/\1/p; s/^\(GGML_[A-Z0-9_]*DEBUG\)=.*/\1/p'); do
    unset "$name" # as `config.child_environment` does here
done
export GGML_NO_BACKTRACE=1
tied=
if setpriv --pdeathsig KILL true 2>/dev/null; then tied="setpriv --pdeathsig KILL"; fi
trap '' PIPE # workers inherit this: a client that disconnects must not end them
exec 3>&1 4<&0
serve "$@" | guard 3>&- 4<&-
