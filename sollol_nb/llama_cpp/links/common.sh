# What the scripts in this folder share; each is sent with this in front (`ssh_session.far_script`).
# POSIX sh and the usual tools only (dash, bash, busybox, macOS).
umask 077
LC_ALL=C
export LC_ALL
HOME=${HOME:-/}
system=$(uname -s)
case $system in
Darwin) caches=$HOME/Library/Caches ;;
*) caches=$HOME/.cache ;;
esac
ours=${XDG_CACHE_HOME:-$caches}/sollol_nb
tensors=$ours/tensors # the workers' caches of weights
sshd=$PPID

digest() { # of stdin
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum
    elif command -v shasum >/dev/null 2>&1; then
        shasum -a 256
    else
        openssl dgst -sha256 -r
    fi | cut -c 1-64
}

# --- workers ------------------------------------------------------------------------------------

# Before the first worker starts: its environment, and in $tied what ends it when this script is killed.
prepare_workers() {
    # As `config.child_environment` does here.
    for name in $(env | sed -n 's/^\(LLAMA_[A-Z0-9_]*\)=.*/\1/p; s/^\(GGML_[A-Z0-9_]*DEBUG\)=.*/\1/p'); do
        unset "$name"
    done
    export GGML_NO_BACKTRACE=1
    tied=
    if setpriv --pdeathsig KILL true 2>/dev/null; then tied="setpriv --pdeathsig KILL"; fi
    trap '' PIPE # workers inherit this: a client that disconnects must not end them
}

# Sets $port, from $seed.
next_port() {
    seed=$(((seed * 75 + 74) % 65537))
    port=$((16384 + seed % 16384)) # below the ports that systems give to outgoing connections
}

# Reads lines of process numbers, and kills the processes of the last one when stdin ends, for whatever reason. The
# line `silent` says that the connection counts as cut.
guard() {
    trap '' TERM HUP INT
    pids='' last=''
    while read -r line; do
        if [ "$line" = silent ]; then last=silent; else pids=$line; fi
    done
    # shellcheck disable=SC2086 # each word is an argument
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null
    # The network was cut without a word: nobody would end the session of sshd, either.
    if [ "$last" = silent ]; then
        case $(ps -o comm= -p "$sshd" 2>/dev/null || cat "/proc/$sshd/comm" 2>/dev/null) in
        *sshd* | *dropbear*) kill -TERM "$sshd" ;;
        esac
    fi
}

