# The far side of seeding.py: fills a worker's cache of tensors from a model's file that this machine has itself.
# POSIX sh and the usual tools only (dash, bash, busybox, macOS). Prints lines `key=value`.
#   find SIZE HEAD TAIL NAME PATH   a file of SIZE bytes whose first and last MiB have these SHA-256 digests
#   seed WORKER DEVICE THREADS SERVER FILE TENSORS SIZES BYTES SILENCE SEED
#     WORKER     the RPC worker program; SERVER, llama-server; both of the same build
#     TENSORS    a regular expression: those of FILE that the worker will get
#     SIZES      in bytes, between commas, of tensors that workers cache
#     BYTES      that will be written at most
#     SILENCE    seconds without a line on stdin after which the connection counts as cut
#     SEED       a random number, from which ports follow
#
# A throw-away worker on loopback writes into a folder of its own. Its files are moved into the cache when all of
# it is written, so that the cache never has a part of a tensor. Everything ends when stdin does.
set -u

say() {
    printf '%s=%s\n' "$1" "$2" >&3
}

size_of() { # FILE
    # shellcheck disable=SC2012 # only its size is read
    ls -Lln "$1" 2>/dev/null | awk '{ print $5 }'
}

# --- find -----------------------------------------------------------------------------------------

find_file() { # SIZE HEAD TAIL NAME PATH
    size=$1 head=$2 tail=$3 name=$4
    limited=
    if timeout 1 true 2>/dev/null; then limited="timeout 20"; fi # other systems, and old busybox, have none
    if is_it "$5"; then return; fi
    for folder in "${OLLAMA_MODELS:-}" "$HOME/.ollama/models" /usr/share/ollama/.ollama/models \
        /var/lib/ollama/models /var/lib/ollama/.ollama/models; do
        [ -n "$folder" ] && [ -d "$folder/blobs" ] || continue
        case $name in sha256-*) if is_it "$folder/blobs/$name"; then return; fi ;; esac
        if find_in "$folder/blobs" 1; then return; fi
    done
    for folder in "$HOME/models" "$caches/llama.cpp" "$HOME/.cache/llama.cpp" "${HF_HOME:-$HOME/.cache/huggingface}" \
        "$HOME/.lmstudio/models" "$HOME/.cache/lm-studio/models"; do
        if find_in "$folder" 8; then return; fi
    done
}

find_in() { # FOLDER DEPTH
    [ -d "$1" ] || return 1
    # shellcheck disable=SC2086 # each word is an argument
    found=$($limited find -L "$1" -maxdepth "$2" -type f -size "${size}c" 2>/dev/null | head -n 20)
    while IFS= read -r file; do
        if [ -n "$file" ] && is_it "$file"; then return 0; fi
    done <<END
$found
END
    return 1
}

is_it() { # FILE
    [ -f "$1" ] && [ -r "$1" ] && [ "$(size_of "$1")" = "$size" ] || return 1
    [ "$(head -c 1048576 "$1" | digest)" = "$head" ] && [ "$(tail -c 1048576 "$1" | digest)" = "$tail" ] || return 1
    say file "$1"
}

# --- seed -----------------------------------------------------------------------------------------

listen() {
    while read -r _; do kill -USR1 "$main" || exit; done
    kill -TERM "$main"
}

# A second passes; false if all has to end.
pass() {
    sleep 1 >/dev/null 3>&- &
    nap=$!
    wait "$nap" # a signal ends it early
    if ! kill -0 "$nap" 2>/dev/null; then missed=$((missed + 1)); fi
    if ! kill -0 "$listener" 2>/dev/null; then ending=yes; fi
    [ -z "$ending" ] && [ "$missed" -lt "$silence" ]
}

tell_guard() {
    echo "$worker_pid $server_pid" # through the pipe
}

lines_with() { # TEXT FILE
    grep -c -e "$1" "$2" 2>/dev/null
}

clean() {
    # shellcheck disable=SC2086 # each word is an argument
    kill -KILL "$listener" $worker_pid $server_pid 2>/dev/null
    rm -rf "$work"
    worker_pid='' server_pid=''
    tell_guard
}

stop() { # nobody waits for it any more
    clean
    [ "$missed" -lt "$silence" ] || echo silent # to the guard
    exit 4
}

fail() { # DETAIL [LOG]
    last=
    if [ -n "${2:-}" ]; then last=": $(grep -v '^ *$' "$2" 2>/dev/null | tail -n 2 | tr '\n' ' ' | cut -c 1-300)"; fi
    say failed "$1$last"
    clean
    exit 3
}

seed() { # WORKER DEVICE THREADS SERVER FILE TENSORS SIZES BYTES SILENCE SEED
    worker=$1 device=$2 threads=$3 server=$4 file=$5 pattern=$6 sizes=$7 bytes=$8
    shift 8
    silence=$1 seed=$2
    main=$(exec sh -c 'echo "$PPID"') # $$ is the process that started this one
    missed=0 ending='' worker_pid='' server_pid=''
    work=$tensors/.seed-$$
    trap 'missed=0' USR1
    trap 'ending=yes' TERM HUP INT
    listen <&4 >/dev/null 3>&- &
    listener=$!
    exec 4<&-
    find_cache || fail "nothing can be cached in $tensors"
    # Of machines that crashed.
    find "$tensors/." -maxdepth 1 -name '.seed-*' -mmin +720 -exec rm -rf {} + 2>/dev/null
    mkdir -p "$work/rpc" || fail "cannot write to $tensors"
    free=$(df -Pk "$work" | awk 'NR == 2 { print $4 }')
    [ "$((bytes / 512))" -le "${free:-0}" ] || fail "too little space in $tensors"
    start_worker
    start_server
    while ! grep -q 'listening on http' "$work/server.log"; do
        kill -0 "$server_pid" 2>/dev/null || fail "llama-server ended" "$work/server.log"
        kill -0 "$worker_pid" 2>/dev/null || fail "the worker ended" "$work/worker.log"
        pass || stop
        say written "$(($(du -k "$work/rpc" | cut -f 1) * 1024))"
    done
    kill -TERM "$server_pid"
    waited=0
    # The worker writes what it has received before it notices that the connection has ended.
    while kill -0 "$server_pid" 2>/dev/null || [ "$(lines_with 'Accepted client' "$work/worker.log")" != \
        "$(lines_with 'Client connection closed' "$work/worker.log")" ]; do
        waited=$((waited + 1))
        [ "$waited" -le 120 ] || fail "the worker did not finish" "$work/worker.log"
        pass || stop
    done
    kill -KILL "$worker_pid"
    wait "$worker_pid" 2>/dev/null
    sync # what is sealed must be on the disk
    moved=0
    for written in "$work"/rpc/*; do
        length=$(size_of "$written")
        case ",$sizes," in *",$length,"*) ;; *) continue ;; esac # a full disk cuts a file
        chmod 400 "$written" && mv -f "$written" "$cache/rpc/" && moved=$((moved + length))
    done
    say seeded "$moved"
    clean
}

# The cache of the device's worker, as agent.sh names it.
find_cache() {
    try=0
    while [ "$try" -lt 16 ]; do
        cache=$tensors/ssh-$(uname -n)-$device-$try
        holder=$(cat "$cache/taken/by" 2>/dev/null)
        if [ -n "$holder" ] && kill -0 "$holder" 2>/dev/null; then
            [ -d "$cache/rpc" ] # else it is off
            return
        fi
        try=$((try + 1))
    done
    return 1
}

start_worker() {
    tries=0
    while :; do
        next_port
        worker_port=$port
        # shellcheck disable=SC2086 # each word is an argument
        LLAMA_CACHE=$work $tied "$worker" -H 127.0.0.1 -p "$worker_port" -t "$threads" -d "$device" -c \
            </dev/null >"$work/worker.log" 2>&1 3>&- &
        worker_pid=$!
        tell_guard
        pass || stop
        if kill -0 "$worker_pid" 2>/dev/null; then return; fi
        tries=$((tries + 1)) # its port may be taken
        [ "$tries" -lt 4 ] || fail "the worker ended" "$work/worker.log"
    done
}

# Only the tensors of the worker go to it; all others stay in the file, and take no memory.
start_server() {
    next_port
    LLAMA_API_KEY=$(od -An -N 24 -tx1 /dev/urandom | tr -d ' \n')
    export LLAMA_API_KEY
    # shellcheck disable=SC2086 # each word is an argument
    LD_LIBRARY_PATH=${server%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
        $tied "$server" -m "$file" --host 127.0.0.1 --port "$port" -c 256 -np 1 -t "$threads" --no-warmup \
        --no-repack --fit off --offline --no-webui -ngl 0 --rpc "127.0.0.1:$worker_port" \
        -ot "$pattern=RPC0[127.0.0.1:$worker_port]" </dev/null >"$work/server.log" 2>&1 3>&- &
    server_pid=$!
    tell_guard
}

exec 3>&1
action=$1
shift
case $action in
find) find_file "$@" ;;
seed)
    prepare_workers
    exec 4<&0
    seed "$@" | guard 3>&- 4<&-
    ;;
esac
