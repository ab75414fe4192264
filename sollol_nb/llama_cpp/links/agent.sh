# Runs the workers of one machine, on its loopback, for the link that has started this script through ssh.
#
# usage: agent.sh PROGRAM SILENCE SEED THREADS CACHE DEVICE...
#   PROGRAM  the RPC worker
#   SILENCE  seconds without a line on stdin after which the connection counts as cut
#   SEED     a random number, from which ports follow
#   THREADS  CPU threads of each worker
#   CACHE    KiB that the caches of weights of all workers may have; 0 for no caches
#
# A line on stdin is a heartbeat; `sizes N...` also says which sizes the tensors have that are cached, and
# `verify NUMBER INDEX...` comes before a load over these workers, which are idle then.
#
# Prints on stdout, where INDEX counts the devices from 0:
#   verified NUMBER         the caches of those workers have only complete files
#   worker INDEX PORT       its worker was started, and will listen on this port
#   ended INDEX CODE PAUSE  its worker has ended with this exit code; it is started again after the pause in seconds
# What workers print comes out on stderr; nothing is written to a file.
#
# Everything ends when stdin does, or is silent for too long. POSIX sh has no `read` with a limit, so there are
# processes: `listen` reads stdin, and wakes `serve`, which counts seconds and owns the workers; `guard` ends the
# workers when `serve` itself is killed. Where all of these are killed at the same moment, Linux ends the workers
# (PR_SET_PDEATHSIG, by util-linux' setpriv), other systems do not.

program=$1 silence=$2 seed=$3 threads=$4 cache_kib=$5
shift 5

listen() {
    while read -r beat; do
        case $beat in
        sizes\ *) note_sizes "${beat#sizes }" ;;
        # shellcheck disable=SC2086 # each word is an argument
        verify\ *) verify ${beat#verify } >&3 & ;;
        esac 2>/dev/null
        kill -USR1 "$server" || exit
    done
    kill -TERM "$server"
}

# --- caches of weights: the rules are those of weights/cache.py ---------------------------------

least_free_kib=1953125 # 2 GB
hash=[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]
hash=$hash$hash # the name of a file

# Sets cache_$1 to the folder of worker $1's cache, which no other process uses; "" if there is none.
claim_cache() {
    eval "device=\$device_$1 cache_$1="
    try=0
    while [ "$cache_kib" != 0 ] && [ "$try" -lt 16 ]; do
        folder=$tensors/ssh-$(uname -n)-$device-$try
        mkdir -p "$folder" 2>/dev/null && is_private || return 0
        if mkdir "$folder/taken" 2>/dev/null; then
            echo "$server" >"$folder/taken/by"
            eval "cache_$1=\$folder"
            return 0
        fi
        holder=$(cat "$folder/taken/by" 2>/dev/null)
        if [ -n "$holder" ] && ! kill -0 "$holder" 2>/dev/null; then
            mv "$folder/taken" "$folder/left-$server" 2>/dev/null && rm -rf "$folder/left-$server"
        else
            try=$((try + 1))
        fi
    done
}

# Whether nobody else can put files into the folder of all caches: a worker believes what it finds.
is_private() {
    [ -n "$(find "$tensors/." -prune -user "$(id -u)" ! -perm -020 ! -perm -002)" ]
} 2>/dev/null

# Makes cache $1 ready for a worker that is about to start; fails if nothing may be cached.
open_cache() {
    [ -n "$1" ] || return 1
    if [ -d "$1/off" ] && [ ! -e "$1/rpc" ]; then mv "$1/off" "$1/rpc"; fi
    mkdir -p "$1/rpc" && discard "$1" && evict && measure && [ "$free" -ge "$least_free_kib" ]
} 2>/dev/null

# Deletes what is not sealed in cache $1: its worker has ended, maybe while it wrote.
discard() {
    find "$1" -type f -name "$hash" -perm -200 -exec rm -f {} +
}

measure() {
    free=$(df -Pk "$tensors" | awk 'NR == 2 { print $4 }')
    used=$(du -sk "$tensors/." | awk '{ print $1 }') # also where it is a link
    allowed=$(((free + used) / 2))
    [ "$allowed" -le "$cache_kib" ] || allowed=$cache_kib
}

# Deletes the least recently used files that are too many.
evict() {
    measure
    [ "$used" -gt "$allowed" ] || return 0
    (
        cd "$tensors" || exit
        find . -type f -name "$hash" ! -perm -200 -exec ls -lntur {} + |
            awk -v over=$(((used - allowed) * 1024)) 'over > 0 { print $NF; over -= $5 }' |
            while read -r file; do rm -f "$file"; done
    )
}

# Those of this user's models, of all machines that have workers here, also `sollol-nb worker`.
note_sizes() {
    { cat "$tensors/sizes"; printf '%s\n' "$1" | tr ' ' '\n'; } | sort -nu | tail -n 20000 >"$tensors/sizes-$server" &&
        mv -f "$tensors/sizes-$server" "$tensors/sizes"
}

# In the folder of a cache, prints the files that `find` selects and that have no known size.
list_unknown() {
    find . -type f -name "$hash" "$@" -exec ls -ln {} + | sizes=$tensors/sizes awk '
        BEGIN { while ((getline size <ENVIRON["sizes"]) > 0) known[size] }
        !($5 in known) { print $NF }'
}

# From the folder of a cache: seals its new files, if all are complete; else deletes them.
seal() {
    # shellcheck disable=SC2046 # these names contain no spaces
    set -- $(find . -type f -name "$hash" -perm -200)
    [ $# != 0 ] || return 0
    if [ -n "$(list_unknown -perm -200)" ] || ! flush "$@"; then rm -f "$@"; fi
    rm -f ../trial
}

# Seals files that are on the disk; fails if one is not. Errors of writes may come out only then. At $deadline, if it
# is set, the rest is deleted. `tend` and `verify` may be here at the same time: a file may be sealed or gone.
flush() {
    trial="dd if=/dev/zero of=../trial bs=65536 count=16"
    if $trial conv=fsync; then
        for each_file in "$@"; do
            if [ -n "$deadline" ] && [ "$(date +%s)" -gt "$deadline" ]; then
                rm -f "$each_file"
            # Opened for writing, one that is sealed would fail, and one that is gone would be made again, empty.
            elif ! { dd if=/dev/null conv=fsync 1<"$each_file" && chmod 400 "$each_file"; } && [ -e "$each_file" ]; then
                return 1
            fi
        done
    else # this dd cannot, or the disk is full
        $trial && [ "$(wc -c <../trial)" -eq 1048576 ] && sync && chmod 400 "$@"
    fi
}

# Before a load over workers $2 and so on: only complete files are left, and then it says so.
verify() {
    number=$1 deadline=$(($(date +%s) + 8)) # a load waits; it sends again what is left then
    shift
    for each in "$@"; do
        eval "cache=\$cache_$each"
        [ -n "$cache" ] || continue
        for files in "$cache/rpc" "$cache/off"; do
            [ -d "$files" ] || continue
            cd "$files" || return 1
            seal
            # shellcheck disable=SC2046
            rm -f $(list_unknown) # something has changed them since they were sealed
            [ -z "$(list_unknown; find . -type f -name "$hash" -perm -200)" ] || return 1
        done
    done
    switch
    echo "verified $number"
}

# Looks after all caches, in a process of its own.
tend() {
    loading='' deadline=''
    each=0
    while [ "$each" -lt "$count" ]; do
        eval "cache=\$cache_$each"
        each=$((each + 1))
        if [ -n "$cache" ] && { cd "$cache/rpc" || cd "$cache/off"; }; then
            if [ -n "$(find . -type f -name "$hash" -perm -200 -mmin -2)" ]; then
                loading=yes
            else
                seal
            fi
        fi
    done
    [ -n "$loading" ] || evict
    switch
}

# Switches all caches on or off.
switch() {
    measure
    from=off to=rpc
    if [ "$used" -gt "$allowed" ] || [ "$free" -lt "$least_free_kib" ]; then from=rpc to=off; fi
    each=0
    while [ "$each" -lt "$count" ]; do
        eval "cache=\$cache_$each"
        each=$((each + 1))
        if [ -d "$cache/$from" ] && [ ! -e "$cache/$to" ]; then mv "$cache/$from" "$cache/$to"; fi
    done
}

# --- workers ------------------------------------------------------------------------------------

# Sets the variables of worker $1: pid, port, since, pause. A port is kept until it is found taken.
start_worker() {
    eval "port=\$port_$1 device=\$device_$1 cache=\$cache_$1"
    caching=
    if open_cache "$cache"; then caching=-c; fi
    [ -n "$port" ] || next_port
    # shellcheck disable=SC2086 # each word is an argument
    LLAMA_CACHE=$cache $tied "$program" -H 127.0.0.1 -p "$port" -t "$threads" -d "$device" $caching \
        </dev/null >&2 3>&- &
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
    eval "since=\$since_$1 pause=\$pause_$1 cache=\$cache_$1"
    [ -z "$cache" ] || discard "$cache"
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
    missed=0 clock=0 count=0 ending= pids= tending=
    trap 'missed=0' USR1
    trap 'ending=yes' TERM HUP INT
    for device in "$@"; do
        eval "pid_$count= port_$count= pause_$count=1 again_$count=0 since_$count=0 device_$count=\$device"
        claim_cache "$count"
        count=$((count + 1))
    done
    listen <&4 >/dev/null &
    listener=$!
    exec 4<&-
    while [ -z "$ending" ] && [ "$missed" -lt "$silence" ]; do
        check_workers
        sleep 1 >/dev/null 3>&- &
        nap=$!
        wait "$nap" # a signal ends it early
        if ! kill -0 "$nap" 2>/dev/null; then
            missed=$((missed + 1)) clock=$((clock + 1))
            if [ "$cache_kib" != 0 ] && [ $((clock % 5)) = 0 ] && ! kill -0 "$tending" 2>/dev/null; then
                tend </dev/null >/dev/null 2>&1 3>&- &
                tending=$!
            fi
        fi
        kill -0 "$listener" 2>/dev/null || ending=yes
    done
    # shellcheck disable=SC2086 # each word is an argument
    kill -KILL "$listener" "$nap" $tending $pids 2>/dev/null
    index=0
    while [ "$index" -lt "$count" ]; do
        eval "cache=\$cache_$index"
        index=$((index + 1))
        [ -z "$cache" ] || rm -rf "$cache/taken"
    done
    rm -f "$tensors/sizes-$server"
    [ "$missed" -lt "$silence" ] || echo silent # to the guard
}

prepare_workers
exec 3>&1 4<&0
serve "$@" | guard 3>&- 4<&-
