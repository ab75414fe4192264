# The far side of remote_engine.py: reports what a machine has, and installs llama.cpp's RPC worker there.
# POSIX sh and the usual tools only (dash, bash, busybox, macOS). Prints lines `key=value`.
#   probe VERSION IDENTITY                        what the machine has, and the engines that may be used
#   devices PROGRAM                               the devices that a worker program offers
#   ship KEY SHA256 RECORD PROGRAM                install the programs of the archive on stdin
#   server WORKER KEY                             the llama-server of the same build, if it is there
#   ship-server KEY SHA256 RECORD PROGRAM         install the llama-server of the archive on stdin
#   build KEY SHA256 RECORD PROGRAM OPTION...     build the source of the archive on stdin with these CMake options
set -u
# A command over ssh lacks what the login shell's start files add.
PATH=$PATH:$HOME/.local/bin:/usr/local/bin:/opt/homebrew/bin:/usr/local/cuda/bin:/opt/rocm/bin
engines=$ours/engines
programs="ggml-rpc-server rpc-server"

say() {
    printf '%s=%s\n' "$1" "$2"
}

fail() { # KIND DETAIL
    say failed "$1"
    say detail "$(printf '%s' "$2" | tr '\n' ' ' | cut -c 1-400)"
    exit 3
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# --- facts --------------------------------------------------------------------------------------

boot() {
    case $system in
    Darwin) sysctl -n kern.bootsessionuuid ;;
    *) cat /proc/sys/kernel/random/boot_id ;;
    esac 2>/dev/null
}

libc() {
    case $system in
    Darwin) sw_vers -productVersion ;;
    *)
        if getconf GNU_LIBC_VERSION; then return; fi
        for loader in /lib/ld-musl-*; do
            if [ -e "$loader" ]; then echo musl; fi
        done
        ;;
    esac 2>/dev/null
}

flags() {
    case $system in
    Darwin)
        sysctl -n machdep.cpu.features machdep.cpu.leaf7_features | tr '[:upper:]' '[:lower:]'
        sysctl hw.optional | sed -n 's/^hw\.optional\.\(.*\): 1$/\1/p'
        ;;
    *) sed -n -e 's/^flags[^:]*: *//p' -e 's/^Features[^:]*: *//p' /proc/cpuinfo | sed q ;;
    esac 2>/dev/null | tr '\n' ' '
}

# Cores that this user's processes may use: with their binding and the control groups' CPU quota.
cores() {
    found=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
    group=$(sed -n 's/^0:://p' /proc/self/cgroup 2>/dev/null)
    while :; do
        quota "$(cat "/sys/fs/cgroup$group/cpu.max" 2>/dev/null)"
        case $group in */*) group=${group%/*} ;; *) break ;; esac
    done
    quota "$(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us 2>/dev/null | tr '\n' ' ')"
    echo "$found"
}

quota() { # "QUOTA PERIOD" in microseconds; without a limit the quota is max or -1
    allowed=${1%% *}
    period=${1#* }
    period=${period%% *}
    case $allowed:$period in *[!0-9:]* | :* | *: | *:0) return ;; esac
    allowed=$(((allowed + period - 1) / period))
    if [ "$allowed" -ge 1 ] && [ "$allowed" -lt "$found" ]; then found=$allowed; fi
}

gpus() {
    count=0
    for gpu in /proc/driver/nvidia/gpus/*; do
        if [ -e "$gpu" ]; then count=$((count + 1)); fi
    done
    if [ "$count" = 0 ] && has nvidia-smi; then count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU '); fi
    say gpus.cuda "$count"
    count=0
    for gpu in /sys/class/kfd/kfd/topology/nodes/*/gpu_id; do # 0 is a CPU
        if [ -r "$gpu" ] && [ "$(cat "$gpu")" != 0 ]; then count=$((count + 1)); fi
    done
    say gpus.hip "$count"
}

tools() {
    for name in c++ g++ clang++ cc gcc clang cmake ninja make nvcc hipcc gzip apt-get dnf pacman zypper apk brew; do
        if has "$name"; then say "tool.$name" "$(command -v "$name")"; fi
    done
    # Every Mac has these names, but without the tools they only open a dialog.
    if [ "$system" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then say missing compiler; fi
    if has cmake; then say cmake "$(cmake --version 2>/dev/null | sed -n '1s/^[^0-9]*//p')"; fi
}

# Whether programs can be put into the cache folder, and started there.
folder() {
    say folder "$engines"
    trial=$engines/.trial-$$
    if ! trouble=$({ mkdir -p "$engines" && printf '#!/bin/sh\nexit 7\n' >"$trial" && chmod 700 "$trial"; } 2>&1); then
        say folder.trouble "$trouble"
        rm -f "$trial"
    else
        trouble=$("$trial" 2>&1)
        code=$?
        rm -f "$trial"
        if [ $code != 7 ]; then
            say folder.noexec "$trouble"
            rmdir "$engines" "$ours" 2>/dev/null # if they are empty, a link can take their place
        fi
    fi
    free_space
}

free_space() {
    place=$engines
    while [ ! -d "$place" ] && [ "$place" != / ]; do place=$(dirname "$place"); done
    say free.kib "$(df -Pk "$place" 2>/dev/null | awk 'NR == 2 { print $4 }')"
}

found_engines() { # VERSION IDENTITY
    for base in "$engines" "$caches/sollol_nb/engines" "$HOME/.cache/sollol_nb/engines"; do
        for engine in "$base/llama.cpp-$1-"* "$base/worker-$2-"*; do
            for program in run $programs; do
                if [ -x "$engine/bin/$program" ] && [ -r "$engine/engine.json" ]; then
                    say engine "$engine/bin/$program"
                    say record "$(tr -d '\n' <"$engine/engine.json" | cut -c 1-4000)"
                    break
                fi
            done
        done
        if [ "$base" = "$engines" ] && [ "$engines" = "$caches/sollol_nb/engines" ]; then break; fi
    done
}

probe() { # VERSION IDENTITY
    say system "$system"
    say architecture "$(uname -m)"
    say libc "$(libc)"
    say user "$(id -un)"
    say boot "$(boot)"
    say network "$(readlink /proc/self/ns/net 2>/dev/null)"
    say flags "$(flags)"
    say cores "$(cores)"
    gpus
    tools
    folder
    found_engines "$1" "$2"
    say end probe
}

# --- the worker program -------------------------------------------------------------------------

# A device that does not exist makes the program list those that do, and end, without listening anywhere. A GPU
# driver that hangs must not keep it for ever.
devices() { # PROGRAM
    limited=
    if timeout 1 true 2>/dev/null; then limited="timeout 50"; fi # other systems, and old busybox, have none
    output=$($limited "$1" -d list-devices </dev/null 2>&1)
    code=$?
    listed=$(printf '%s\n' "$output" | sed -n 's/^  *\([^ :]*: .* MiB free)\)$/device=\1/p' | head -n 64)
    if [ -z "$listed" ]; then
        why="exit code $code"
        if [ -n "$limited" ] && [ "$code" = 124 ]; then why="it has not listed its devices within 50 s"; fi
        trouble="$why: $(printf '%s' "$output" | tail -n 3 | tr '\n' ' ' | cut -c 1-300)"
        return 1
    fi
    printf '%s\n' "$listed"
}

# The llama-server beside a worker program, or installed by `ship-server`.
server() { # WORKER KEY
    for program in "${1%/*}/llama-server" "$engines/$2/bin/llama-server"; do
        if [ -x "$program" ] && runs "$program"; then
            say server "$program"
            return
        fi
    done
}

runs() { # SERVER; a build of the user's own may look for its libraries where it was built
    output=$(LD_LIBRARY_PATH=${1%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$1" --version </dev/null 2>&1) && return
    trouble="exit code $?: $(printf '%s' "$output" | tail -n 3 | tr '\n' ' ' | cut -c 1-300)"
    return 1
}

# --- install ------------------------------------------------------------------------------------

# The work folder is the lock: at most one installation of this boot of this machine at a time.
take_work_folder() {
    # Process numbers mean the same within one boot and one PID namespace; a home may be shared by machines.
    mkdir -p "$engines" 2>/dev/null
    work=$engines/.work-$({ boot; readlink /proc/self/ns/pid; } 2>/dev/null | digest | cut -c 1-10)
    nameless=0
    until mkdir "$work" 2>/dev/null; do
        if [ ! -d "$work" ]; then
            trouble=$(mkdir "$work" 2>&1) && rmdir "$work" && continue
            fail "$(disk_or folder "$trouble")" "$trouble"
        fi
        owner=
        { read -r owner began <"$work/owner"; } 2>/dev/null
        if [ -n "$owner" ] && [ "$(started "$owner")" = "$began" ]; then
            say waiting "$owner" || exit 1
        elif [ -z "$owner" ] && [ "$nameless" -lt 3 ]; then
            nameless=$((nameless + 1))
        else
            mv "$work" "$engines/.dead-$$" 2>/dev/null && rm -rf "$engines/.dead-$$"
            continue
        fi
        sleep 1
    done
    step=
    trap 'if [ -n "$step" ]; then end_tree "$step"; fi; rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    trap '' PIPE # a client that has left shows as an error of `say`
    printf '%s %s\n' $$ "$(started $$)" >"$work/owner" || fail disk "cannot write to $work"
}

started() { # PID; when it started, "" if it does not run
    if [ -r "/proc/$1/stat" ]; then
        sed 's/.*) //' "/proc/$1/stat" | cut -d ' ' -f 20
    else
        ps -o lstart= -p "$1"
    fi 2>/dev/null
}

disk_or() { # KIND TEXT
    case $2 in
    *"No space left"* | *"quota exceeded"*) echo disk ;;
    *) echo "$1" ;;
    esac
}

receive() { # SHA256
    if ! trouble=$(cat 2>&1 >"$work/archive"); then fail "$(disk_or folder "$trouble")" "$trouble"; fi
    received=$(digest <"$work/archive")
    if [ "$received" != "$1" ]; then fail hash "SHA-256 $received instead of $1"; fi
}

unpack() { # FOLDER
    if ! trouble=$({ mkdir -p "$1" && cd "$1" && gzip -dc "$work/archive" | tar xf - && rm "$work/archive"; } 2>&1); then
        fail "$(disk_or unpack "$trouble")" "$trouble"
    fi
}

works() { # PROGRAM
    case $how in
    ship-server) runs "$1" ;;
    *) devices "$1" ;;
    esac
}

install_engine() { # ship|ship-server|build KEY SHA256 RECORD PROGRAM OPTION...
    how=$1 key=$2 sha=$3 record=$4 program=$5
    shift 5
    take_work_folder
    if [ -x "$engines/$key/bin/$program" ] && works "$engines/$key/bin/$program"; then
        say installed "$engines/$key/bin/$program"
        return
    fi
    receive "$sha"
    case $how in
    ship | ship-server) unpack "$work/$key/bin" ;;
    build)
        unpack "$work/source"
        build "$@"
        ;;
    esac
    works "$work/$key/bin/$program" || fail run "$trouble"
    printf '%s\n' "$record" >"$work/$key/engine.json" || fail disk "cannot write to $work"
    if [ -e "$engines/$key" ]; then mv "$engines/$key" "$work/old"; fi
    if ! trouble=$(mv "$work/$key" "$engines/" 2>&1); then fail "$(disk_or folder "$trouble")" "$trouble"; fi
    say installed "$engines/$key/bin/$program"
}

# --- build --------------------------------------------------------------------------------------

build() { # OPTION...
    log=$ours/build-$key.log
    nice=
    if has nice; then nice=nice; fi # busybox may have none
    : >"$log" || fail disk "cannot write to $log"
    run_step $nice cmake --no-warn-unused-cli -S "$work/source" -B "$work/build" "$@"
    run_step $nice cmake --build "$work/build" --target ggml-rpc-server --parallel "$(cores)"
    rm -f "$log"
    mkdir -p "$work/$key/bin"
    for file in "$work"/build/bin/*; do
        case ${file##*/} in
        ggml-rpc-server | libggml*) mv "$file" "$work/$key/bin/" ;;
        esac
    done
}

run_step() { # COMMAND...; says how far it is, and ends it when nobody listens any more
    rm -f "$work/code"
    (
        "$@" >>"$log" 2>&1 </dev/null
        echo $? >"$work/code"
    ) &
    step=$!
    while [ ! -s "$work/code" ] && kill -0 "$step" 2>/dev/null; do
        sleep 1
        if ! say step "$(tail -n 1 "$log" | cut -c 1-200)" 2>/dev/null; then
            rm -f "$log"
            exit 1 # the trap ends the step
        fi
    done
    wait "$step"
    step=
    code=$(cat "$work/code" 2>/dev/null)
    if [ "$code" != 0 ]; then
        say log "$log"
        awk '/error|FAILED|No space left|quota exceeded|Killed|undefined reference/ { n = 4 } n-- > 0' "$log" |
            head -n 40 | cut -c 1-300 | sed 's/^/line=/'
        tail -n 20 "$log" | cut -c 1-300 | sed 's/^/line=/'
        if grep -q -e 'No space left on device' -e 'quota exceeded' "$log"; then free_space; fail disk "$log"; fi
        fail build "exit code ${code:-unknown}"
    fi
}

end_tree() { # PID; each is stopped before its children are listed, so that none escapes
    kill -STOP "$1" 2>/dev/null
    for child in $(children "$1"); do end_tree "$child"; done
    kill -KILL "$1" 2>/dev/null
}

children() { # PID
    { ps -A -o pid= -o ppid= 2>/dev/null || ps -o pid,ppid; } | awk -v parent="$1" '$2 == parent { print $1 }'
}

action=$1
shift
case $action in
probe) probe "$@" ;;
devices) devices "$1" || fail run "$trouble" ;;
server) server "$@" ;;
ship | ship-server | build) install_engine "$action" "$@" ;;
esac
