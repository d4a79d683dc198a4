"""The shell scripts that we copy into a container. POSIX sh, so that an image without Python will do.

The folder that holds them (``$0``'s) has ``spool/`` beside it, and ``python``: the path of the interpreter that
``start.sh`` found fit for us, empty for none.
"""

#: The last line of what START reads: without it something was lost on the way, and the program must not start.
WHOLE = "mlflow_remote_whole=1\n"

#: The container's first process. Reads the secrets (``export`` lines) from its stdin, sees to the variables that
#: programs rely on under a user that the image does not know, and becomes ``execute``. ``$1``: a further interpreter.
START = r"""#!/bin/sh
ours=${0%/*}
eval "$(cat)"
[ -n "${mlflow_remote_whole-}" ] || { echo "The connection broke before everything had come." >&2; exit 125; }

usable() { [ -n "$1" ] && [ -d "$1" ] && [ -w "$1" ]; }
usable "${HOME-}" || HOME=$ours/home
USER=${USER:-${LOGNAME:-$(id -un 2>/dev/null)}}
case $USER in ''|*[!0-9]*) ;; *) USER= ;; esac
USER=${USER:-mlflow}
usable "${TMPDIR-}" || { usable /tmp && TMPDIR=/tmp; } || TMPDIR=$ours/tmp
LOGNAME=${LOGNAME:-$USER}
XDG_CACHE_HOME=${XDG_CACHE_HOME:-$HOME/.cache}
MPLCONFIGDIR=${MPLCONFIGDIR:-$HOME/.config/matplotlib}
export HOME USER LOGNAME TMPDIR XDG_CACHE_HOME MPLCONFIGDIR

python=
for each in python3 python "$@"; do
    found=$(command -v "$each" 2>/dev/null) || continue
    case $(readlink -f "$found" 2>/dev/null) in
        *python3.[789] | *python3.[1-9][0-9]) ;;  # its name says that it will do
        *) "$found" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 7))' >/dev/null 2>&1 || continue ;;
    esac
    python=$found
    break
done
printf %s "$python" > "$ours/python"
if [ -n "$python" ]; then
    exec "$python" -I -S "$ours/execute.py" "$ours/spool"
fi
exec /bin/sh "$ours/execute.sh" "$ours/spool"
"""

#: A further process of the container: sends us the log from the offset that its stdin names, while it grows.
FOLLOW = r"""#!/bin/sh
ours=${0%/*}
python=$(cat "$ours/python" 2>/dev/null)
if [ -n "$python" ]; then
    exec "$python" -I -S "$ours/tail.py" "$ours/spool"
fi
exec /bin/sh "$ours/tail.sh" "$ours/spool"
"""

#: tail.py's twin: the same protocol, but it drops nothing and looks five times a second.
TAIL = r"""#!/bin/sh
spool=$1
log=$spool/log/000000
read -r offset greeting
printf '%s\n' "$greeting"
exec 3<&0
{ while read -r _ <&3; do :; done; kill $$; } 2>/dev/null &  # nobody listens any more
turn=0
while :; do
    ended=
    [ -e "$spool/exit.json" ] && ended=1
    size=0
    [ -e "$log" ] && { set -- $(ls -ln "$log"); size=$5; }
    if [ "$size" -gt "$offset" ]; then
        tail -c "+$((offset + 1))" "$log" | head -c "$((size - offset))"
        offset=$size
        continue
    fi
    [ -n "$ended" ] && exit 0
    if [ "$((turn % 10))" -eq 0 ]; then
        for name in started.json vitals.json; do
            [ -e "$spool/$name" ] && printf '%s %s\n' "$name" "$(cat "$spool/$name")" >&2
        done
        if printf '%4096s' '' 2>/dev/null > "$spool/.room"; then state=alive; else state=full; fi
        rm -f "$spool/.room"
        printf '%s\n' "$state" >&2
    fi
    turn=$((turn + 1))
    sleep 0.2 2>/dev/null || sleep 1
done
"""
