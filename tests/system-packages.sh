#!/bin/sh
# The extras of `make test` that are not Python packages: a redis-server, the emoji font, Prometheus, and
# Chromium; with the argument `images` also those of `make test-images`.
# Installed where this runs as root on Debian; elsewhere their absence is said and the tests that need them skip.
set -eu
missing=""
command -v redis-server >/dev/null 2>&1 || missing="$missing redis-server"
[ -e /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ] || missing="$missing fonts-noto-color-emoji"
command -v promtool >/dev/null 2>&1 || missing="$missing prometheus"
command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
if [ "${1:-}" = images ]; then
    for tool in buildah debootstrap; do
        command -v "$tool" >/dev/null 2>&1 || missing="$missing $tool"
    done
fi
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
else
    echo "not installed:$missing (tests that need them will skip)" >&2
fi
