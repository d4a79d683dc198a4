#!/bin/sh
# The twin of execute.py for images without Python: any POSIX shell, cat, mkfifo, mv, rm, date and sleep.
#
#     sh execute.sh [--tee] [--env-stdin] SPOOL
#
# The same files as spool.py describes, with these differences: the command comes from SPOOL/command.sh; the log is one
# segment of any length; with --tee the log waits for a stdout that nobody reads; of a log over its limit only the start
# is kept; times are whole seconds; a cancel is seen within a second. The program is in a session of its own where the
# image has setsid, and the lock is held where it has flock.

set -u

tee='' env_stdin='' become=''
while [ $# -gt 1 ]; do
    case $1 in
        --tee) tee=1 ;;
        --env-stdin) env_stdin=1 ;;
        --become) become=1 ;;
    esac
    shift
done
spool=$1
tee_option=$tee
. "$spool/command.sh"
tee=${tee_option:-$tee}

if [ -n "$become" ]; then
    become_program
    exit 126
fi

# ------------------------------------------------------------------------------------------------------------ records

now() { date +%s; }

uptime_s() {
    if read -r up rest < /proc/uptime; then echo "${up%%.*}"; else now; fi
} 2>/dev/null

write() { # NAME, content from stdin: replaced atomically, again and again while the disk is full
    content=$(cat)
    until { printf '%s\n' "$content" > "$spool/.$1.tmp" && mv "$spool/.$1.tmp" "$spool/$1"; } 2>/dev/null; do
        sleep 1
    done
}

field() { # FILE NAME: the number beside a name, as in memory.stat
    while read -r name value; do
        if [ "$name" = "$2" ]; then echo "$value"; return; fi
    done 2>/dev/null < "$1"
}

first() { # FILE: its first word, where it is a number
    { read -r value rest < "$1" || return; } 2>/dev/null
    case $value in *[!0-9]* | '') ;; *) echo "$value" ;; esac
}

memory() { # sets memory_bytes, memory_limit_bytes and oom_kills; empty where the system does not tell
    cgroup=/sys/fs/cgroup
    if [ -r $cgroup/memory.current ]; then
        memory_bytes=$(first $cgroup/memory.current)
        cache=$(($(field $cgroup/memory.stat active_file) + $(field $cgroup/memory.stat inactive_file) + 0))
        memory_limit_bytes=$(first $cgroup/memory.max)
        oom_kills=$(field $cgroup/memory.events oom_kill)
    elif [ -r $cgroup/memory/memory.usage_in_bytes ]; then
        memory_bytes=$(first $cgroup/memory/memory.usage_in_bytes)
        cache=$(($(field $cgroup/memory/memory.stat total_active_file) \
            + $(field $cgroup/memory/memory.stat total_inactive_file) + 0))
        memory_limit_bytes=$(field $cgroup/memory/memory.stat hierarchical_memory_limit)
        oom_kills=$(field $cgroup/memory/memory.oom_control oom_kill)
        [ ${#memory_limit_bytes} -lt 19 ] || memory_limit_bytes=''
    else
        memory_bytes='' memory_limit_bytes='' oom_kills='' cache=0
    fi
    [ -z "$memory_bytes" ] || memory_bytes=$((memory_bytes > cache ? memory_bytes - cache : 0))
}

vitals() {
    memory
    [ "${memory_bytes:-0}" -le "${memory_peak_bytes:-0}" ] || memory_peak_bytes=$memory_bytes
    {
        printf '{"at": %s, "memory_bytes": %s, ' "$(now)" "${memory_bytes:-null}"
        printf '"memory_peak_bytes": %s, "memory_limit_bytes": %s, ' "${memory_peak_bytes:-null}" "${memory_limit_bytes:-null}"
        printf '"oom_kills": %s, "signals": [%s]}' "$(kills)" "$(signals)"
    } | write vitals.json
}

kills() { if [ -n "$oom_kills" ]; then echo $((oom_kills - oom_kills_before)); else echo null; fi; }

signals() { cat "$spool/.signals" 2>/dev/null; }

# ------------------------------------------------------------------------------------------------------------ signals

kill_program() { # SIGNAL, to all that is the program's
    if [ -n "$session" ]; then
        kill -s "$1" -- "-$program" 2>/dev/null
    else
        for each in /proc/[0-9]*; do
            ! grep -q "MLFLOW_REMOTE_EXECUTION=$token" "$each/environ" 2>/dev/null || kill -s "$1" "${each#/proc/}"
        done
    fi
}

received() { # NUMBER NAME
    signalled=$1
    comma=''
    [ ! -s "$spool/.signals" ] || comma=', '
    printf '%s{"signal": %s, "at": %s}' "$comma" "$1" "$(now)" >> "$spool/.signals"
    [ "$2" = TERM ] || kill_program "$2"
}

stop() { # WHY: SIGTERM once; the watcher sends SIGKILL after the grace period
    [ -z "$stopped_by$ended" ] || return 0
    stopped_by=$1
    echo $(($(uptime_s) + grace_period_s)) > "$spool/.grace_ends"
    kill_program TERM
}

watch() { # as a child, each second: vitals, the cancel file, the timeout, the end of the grace period
    trap 'kill "$nap"; exit' TERM
    begin=$(uptime_s)
    while kill -0 $$ && [ ! -e "$spool/exit.json" ]; do # a signal that comes before the trap is lost
        sleep 1 &
        nap=$!
        wait "$nap"
        vitals
        if [ -s "$spool/.grace_ends" ]; then
            [ "$(uptime_s)" -lt "$(first "$spool/.grace_ends")" ] || kill_at_last
        elif [ -e "$spool/cancel" ]; then
            ask_to_stop cancel
        elif [ -n "$timeout_s" ] && [ $(($(uptime_s) - begin)) -ge "$timeout_s" ]; then
            ask_to_stop timeout
        fi
    done
}

kill_at_last() {
    : > "$spool/.killed"
    kill_program KILL
    exit
}

ask_to_stop() { # WHY
    [ ! -e "$spool/.wanted" ] || return
    echo "$1" > "$spool/.wanted"
    kill -s TERM $$
}

on_term() {
    signalled=15
    if [ -e "$spool/.wanted" ]; then
        stop "$(cat "$spool/.wanted")"
    else
        received 15 TERM
        stop signal
    fi
}

# ---------------------------------------------------------------------------------------------------------- execution

take_log() { # the pipe's reader
    if [ -n "$log_limit_bytes" ]; then
        { head -c "$log_limit_bytes"; cat > /dev/null; }
    else
        cat
    fi | if [ -n "$tee" ]; then tee "$spool/log/000000"; else cat > "$spool/log/000000"; fi
    : > "$spool/.drained"
}

record() { # EXIT_CODE ERROR
    rm -f "$spool/.pipe" "$spool/.wanted" "$spool/.drained" "$spool/.grace_ends"
    memory
    [ -e "$spool/.killed" ] && killed=true || killed=false
    [ "$stopped_by" = timeout ] && timed_out=true || timed_out=false
    [ -z "$stopped_by" ] && why=null || why="\"$stopped_by\""
    {
        printf '{"exit_code": %s, "signal": null, "stopped_by": %s, ' "$1" "$why"
        printf '"timed_out": %s, "killed": %s, "signals": [%s], ' "$timed_out" "$killed" "$(signals)"
        printf '"memory_peak_bytes": null, "memory_limit_bytes": %s, ' "${memory_limit_bytes:-null}"
        printf '"oom_kills": %s, "log_bytes": null, "log_cut_bytes": 0, ' "$(kills)"
        printf '"started_at": %s, "ended_at": %s, "seconds": %s, ' "$started_at" "$ended_at" $((ended_up - started_up))
        printf '"error": %s}' "${2:-null}"
    } | write exit.json
    exit "$1"
}

mkdir -p "$spool/log"
rm -f "$spool/.pipe" "$spool/.drained" "$spool/.signals" "$spool/.killed" "$spool/.wanted" "$spool/.grace_ends"
if command -v flock > /dev/null 2>&1; then
    exec 9> "$spool/.lock"
    flock 9 && mv -f "$spool/.lock" "$spool/lock" # under its name only once it is held: else we would pass for dead
fi
[ -z "$env_stdin" ] || eval "$(cat)"
token=$(cat /proc/sys/kernel/random/uuid 2>/dev/null || echo "$$-$(now)")

stopped_by='' ended='' watcher='' reader='' memory_peak_bytes=''
started_at=$(now) started_up=$(uptime_s)
ended_at=$started_at ended_up=$started_up
memory
oom_kills_before=${oom_kills:-0}

if [ -e "$spool/cancel" ]; then
    stopped_by=cancel
    record 143 '{"code": "CANCELLED", "message": "The run was cancelled before its program started."}'
fi
if ! mkfifo "$spool/.pipe"; then
    record 126 '{"code": "BOOTSTRAP", "message": "The image has no mkfifo, or the spool takes no pipe."}'
fi

trap on_term TERM
trap 'received 1 HUP' HUP
trap 'received 2 INT' INT
trap 'received 3 QUIT' QUIT
trap 'received 10 USR1' USR1
trap 'received 12 USR2' USR2

( trap '' HUP INT QUIT TERM USR1 USR2 PIPE; take_log < "$spool/.pipe" ) 9>&- &
reader=$!
if command -v setsid > /dev/null 2>&1; then
    session=setsid
else
    session=''
fi
MLFLOW_REMOTE_EXECUTION=$token $session sh "$0" --become "$spool" < /dev/null > "$spool/.pipe" 2>&1 9>&- &
program=$!
printf '{"pid": %s, "token": "%s", "execute_pid": %s, "started_at": %s}' \
    "$program" "$token" $$ "$started_at" | write started.json
( trap '' HUP INT QUIT USR1 USR2; watch ) 9>&- > /dev/null 2>&1 &
watcher=$!

# A trap interrupts wait, which then answers 128 and the signal: it is asked again, and knows a program's status also
# when that ended meanwhile. Should it have told already, and forgotten since (127), the first answer was the program's.
code=''
while :; do
    signalled=''
    wait "$program"
    told=$?
    [ "$told" != 127 ] || [ -z "$code" ] || [ "$code" = "$interrupted" ] || break
    code=$told
    [ -n "$signalled" ] || break
    interrupted=$((128 + signalled))
done
ended=1 ended_at=$(now) ended_up=$(uptime_s)

# What the program left behind may write for 5 s more, or for the rest of a grace period.
left_s=5
[ -z "$stopped_by" ] || [ "${grace_period_s:-0}" -le 5 ] || left_s=$grace_period_s
until=$((ended_up + left_s))
while [ "$(uptime_s)" -lt "$until" ] && [ ! -e "$spool/.killed" ]; do
    if [ -e "$spool/.drained" ]; then
        [ -n "$stopped_by" ] && [ -n "$session" ] && kill -0 -- "-$program" 2>/dev/null || break
    fi
    sleep 0.1 2>/dev/null || sleep 1
done
kill_program KILL
tries=0
while [ ! -e "$spool/.drained" ] && [ $tries -lt 10 ]; do
    sleep 0.1 2>/dev/null || sleep 1
    tries=$((tries + 1))
done
kill "$watcher" 2>/dev/null
[ -e "$spool/.drained" ] || kill -s KILL "$reader" 2>/dev/null
record "$code" ''
